"""Requests whose answer is JSON. Used by corpus.py.

A request is (question, answer, system): system is true when the system prompt, not the question, asks for JSON.
Held out are facts asked in their held-out words, questions on held-out topics, and 12 % of the other request strings.
"""
import json

import worlds as W
from unknowns import made
from words import BOYS, GIRLS, cap, held_out, made_up, person

SYSTEMS = ["Answer in JSON.", "Reply only with JSON.", "Always answer with a JSON object.",
           "You answer every question with JSON.", "Respond in JSON.", "Output JSON only.",
           "You are a JSON API. Answer with JSON."]
UNKNOWN = json.dumps({"error": "I do not know that."})
SUFFIXES = [" Answer in JSON.", " as JSON", ", as JSON please", " in JSON", " (JSON)",
            " Reply with JSON.", " as a JSON object", ". Use JSON."]
NEW_SUFFIXES = [" Respond in JSON.", " Give the answer as JSON.", " as json", " in JSON format", " - JSON please",
                " JSON only.", " Return JSON."]
NEW_PREFIXES = ["Answer as JSON: ", "In JSON: ", "As JSON, ", "JSON please: ", "Reply in JSON. "]
OLD = {k: [p + " as JSON." for p in v] + [v[0] + " in JSON.", "JSON: " + v[0]] for k, v in {
    "capital": ["Give me the capital of {x}", "Show the capital of {x}", "Return the capital of {x}"],
    "country": ["Give me the country with the capital {x}", "Return the country of {x}"],
    "opposite": ["Give me the opposite of {x}", "Return the opposite of {x}"],
    "plural": ["Give me the plural of {x}", "Return the plural of {x}"],
    "colour": ["Give me the colour of {x}", "Return the color of {x}"],
    "sound": ["Give me the sound of {x}", "Return the sound of {x}"],
    "baby": ["Give me the young of {x}", "Return the name of the young of {x}"],
    "legs": ["Give me the number of legs of {x}", "Return the legs of {x}"],
    "after": ["Give me what comes after {x}", "Return what follows {x}"],
    "before": ["Give me what comes before {x}", "Return what is before {x}"],
    "days": ["Give me the days in {x}", "Return the number of days in {x}"],
    "sum": ["Give me {x}", "Return {x}", "Calculate {x}"]}.items()}
NOUN = {"capital": "capital of {x}", "country": "country with the capital {x}", "opposite": "opposite of {x}",
        "plural": "plural of {x}", "colour": "colour of {x}", "sound": "sound of {x}", "baby": "young of {x}",
        "legs": "number of legs of {x}", "after": "one after {x}", "before": "one before {x}",
        "days": "number of days in {x}", "sum": "result of {x}"}
NEW = ["{n} as JSON", "the {n} in JSON", "What is the {n}? Answer in JSON.", "What is the {n} as JSON?",
       "Write the {n} as a JSON object.", "Can you give me the {n} as JSON?", "I need the {n} as JSON.",
       "JSON with the {n}", "Print the {n} as JSON.", "Tell me the {n} in JSON.", "{n}, JSON"]
KEYED = ["Give me the {n} as JSON with the keys {k}.", "What is the {n}? Use JSON with the keys {k}."]
PERSON = ["Give me a person named {x}, age {y}, as JSON.", "{x} is {y} years old. Write this as JSON.",
          "JSON for a person called {x} who is {y}.", "Turn this into JSON: {x}, {y} years old.",
          "Make a JSON object with name {x} and age {y}.", "Write a JSON object for {x}, who is {y} years old.",
          "Give me JSON for {x} aged {y}.", "A person as JSON: name {x}, age {y}"]
CITIZEN = ["Make a JSON object with name {x}, age {y} and city {z}.",
           "{x} is {y} years old and lives in {z}. Write this as JSON.", "JSON for {x}, {y} years old, from {z}.",
           "Turn this into JSON: name {x}, age {y}, city {z}.", "Give me {x}, {y}, from {z} as JSON."]
LIST = ["Write {x} as a JSON list.", "Turn {x} into a JSON array.", "JSON list of {x}",
        "Give me a JSON array with {x}.", "Make a JSON list of {x}."]
PAIRS = ["Make a JSON object with {x}.", "Write a JSON object where {x}.", "JSON with {x}", "As JSON: {x}"]
RANGE = ["Count from {x} to {y} as a JSON list.", "JSON list of the numbers from {x} to {y}",
         "Give me the numbers {x} to {y} as a JSON array."]
THINGS = ("apple banana pear cherry red blue green cat dog bird one two three router token cache "
          "node sun moon star tea milk bread cup book").split()
KEYS = "colour size name city type model port host user level title shape price count".split()
FIXED = [(["the days of the week", "all days of the week"], W.DAYS),
         (["the months", "the months of the year", "all months"], W.MONTHS),
         (["the seasons", "the four seasons"], ["spring", "summer", "autumn", "winter"]),
         (["the primary colours", "the primary colors"], ["red", "yellow", "blue"]),
         (["the planets", "all planets", "the eight planets"],
          "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()),
         (["the parts of a baton cluster", "the roles in a cluster"], ["router", "prefill node", "decode group"]),
         (["the baton commands", "all baton commands"],
          ["up", "router", "prefill", "decode", "chat", "status", "config show", "logits"]),
         (["your name", "the name of this model"], {"name": "baton demo model"}),
         (["the licence of baton", "the license of baton"], {"project": "baton", "licence": "Apache-2.0"})]
FIXED_FORMS = ["Give me {x} as JSON.", "List {x} as JSON.", "{x} as JSON", "Write {x} in JSON.",
               "Return {x} as JSON.", "JSON: {x}", "Show me {x} as JSON.", "Give me {x} as a JSON list."]


def request(r, facts, sums, test=False):
    """facts, sums: functions of r that draw one Fact."""
    while True:
        question, answer, system, kept = draw(r, facts, sums, test)
        if (held_out("json", question) if kept is None else kept) == test:
            return question, answer, system


def draw(r, facts, sums, test):
    """(question, answer, asked by the system prompt, held out; None: decided by the question string)"""
    u = r.random()
    if u < 0.10:
        name, age = person(r), r.randrange(2, 90)
        return r.choice(PERSON).format(x=name, y=age), json.dumps({"name": name, "age": age}), False, None
    if u < 0.15:
        name, age, city = person(r), r.randrange(2, 90), r.choice(list(W.CAPITALS.values()))
        return (r.choice(CITIZEN).format(x=name, y=age, z=city),
                json.dumps({"name": name, "age": age, "city": city}), False, True)
    if u < 0.20:
        things = [made_up(r) if r.random() < 0.3 else t for t in r.sample(THINGS, r.randrange(2, 5))]
        shown = ", ".join(things) if r.random() < 0.6 else ", ".join(things[:-1]) + " and " + things[-1]
        return r.choice(LIST).format(x=shown), json.dumps(things), False, None
    if u < 0.25:
        keys = r.sample(KEYS, r.randrange(1, 4))
        values = [r.choice([r.choice(THINGS), made_up(r), r.randrange(100), r.choice(GIRLS + BOYS)]) for _ in keys]
        style = r.choice(["{k} {v}", "{k} is {v}", "{k}: {v}", "{k} = {v}"])
        shown = [style.format(k=k, v=v) for k, v in zip(keys, values)]
        shown = ", ".join(shown[:-1]) + " and " + shown[-1] if len(shown) > 1 else shown[0]
        return r.choice(PAIRS).format(x=shown), json.dumps(dict(zip(keys, values))), False, None
    if u < 0.27:
        x = r.randrange(0, 10)
        y = x + r.randrange(2, 9)
        return r.choice(RANGE).format(x=x, y=y), json.dumps(list(range(x, y + 1))), False, None
    if u < 0.33:
        names, value = r.choice(FIXED)
        return cap(r.choice(FIXED_FORMS).format(x=r.choice(names))), json.dumps(value), False, None
    if u < 0.38:
        if r.random() < 0.5:
            return made(r, test), UNKNOWN, True, test
        return made(r, test).rstrip("?.") + r.choice(SUFFIXES + NEW_SUFFIXES), UNKNOWN, False, test
    f = sums(r) if r.random() < 0.18 else facts(r)
    kind, answer = "sum" if f.kind.startswith("sum") else f.kind, json.dumps(f.data)
    u = r.random()
    if u < 0.2:
        kept = bool(test and f.test)
        return r.choice(f.test if kept else f.train), answer, True, kept
    if u < 0.3:
        return r.choice(OLD[kind]).format(x=f.short[0]), answer, False, False
    if u < 0.4:
        return r.choice(f.train).rstrip("?.") + r.choice(SUFFIXES), answer, False, False
    if u < 0.75:
        noun = NOUN[kind].format(x=f.short[0])
        keys = " and ".join((json.dumps(k) if r.random() < 0.5 else k) for k in f.data)
        t = r.choice(KEYED if r.random() < 0.1 and len(f.data) == 2 else NEW)
        return cap(t.format(n=noun, k=keys)), answer, False, None
    q = r.choice(f.train)
    q = r.choice(NEW_PREFIXES) + q if r.random() < 0.4 else q + r.choice(NEW_SUFFIXES[:2] + NEW_SUFFIXES[5:]) \
        if r.random() < 0.5 else q.rstrip("?.") + r.choice(NEW_SUFFIXES[2:5])
    return q, answer, False, None
