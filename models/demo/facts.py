"""Questions with one right answer: facts about baton (facts.txt), small world facts, sums. Used by corpus.py."""
from dataclasses import dataclass, field
from pathlib import Path

import worlds as W
from words import a, cap, expand, held_out, plain


@dataclass
class Fact:
    kind: str              # decides which follow-up questions fit
    group: str             # category in the score
    key: str               # names the fact in the held-out rule
    forms: list            # ways to ask, including the held-out ones
    answers: list          # accepted answers; the first is the usual one
    short: list = field(default_factory=list)  # "And {short}?" within this kind
    data: dict = None      # the answer as JSON, where that makes sense
    more: list = field(default_factory=list)   # ways to ask for training only
    train: list = None
    test: list = None

    def split(self):
        self.test = [f for f in self.forms if held_out(self.key, f)]
        self.test = self.test[:len(self.forms) // 3]  # never starve a small fact
        self.train = [f for f in self.forms if f not in self.test]
        held = {plain(f) for f in self.test}
        self.train += [f for f in self.more if plain(f) not in held]
        return self


def load(params):
    """All facts, split into training and held-out questions. params: size of the model in millions."""
    return [f.split() for f in baton(params) + world() + sums()]


def baton(params):
    facts, kind, forms, group = [], None, None, None
    for line in (Path(__file__).parent / "facts.txt").read_text().splitlines():
        tag, _, rest = line.partition(":")
        rest = rest.strip().replace("{params}", params)
        if tag == "section":
            group = rest
        elif tag in ("def", "how", "ask"):
            parts = [p.strip() for p in rest.split(" | ")]
            kind, forms = tag, parts
            if tag != "ask":
                t = W.DEF_FORMS if tag == "def" else W.HOW_FORMS
                # the first name gets every template, the others a rotating half
                forms = expand(t, x=parts[0])
                for i, p in enumerate(parts[1:]):
                    forms += expand(t[i % 2::2], x=p)
            facts.append(Fact(kind, group, f"{kind}:{parts[0]}", forms, [], parts if tag == "def" else []))
        elif tag == "more":
            facts[-1].more = [p.strip() for p in rest.split(" | ")]
        elif tag == "A":
            facts[-1].answers.append(rest)
    return facts


def world():
    facts = []

    def add(kind, x, forms, answer, short, data):
        facts.append(Fact(kind, "facts", f"{kind}:{x}", forms, [answer], [short], data))

    for country, capital in W.CAPITALS.items():
        add("capital", country, expand(W.CAPITAL_FORMS, x=country), f"The capital of {country} is {capital}.",
            country, {"country": country, "capital": capital})
        add("country", capital, expand(W.COUNTRY_FORMS, x=capital), f"{capital} is the capital of {country}.",
            capital, {"capital": capital, "country": country})
    pairs = W.OPPOSITES + [(y, x) for x, y in W.OPPOSITES]
    for x, y in dict(pairs).items():
        add("opposite", x, expand(W.OPPOSITE_FORMS, x=x), f"The opposite of {x} is {y}.", x,
            {"word": x, "opposite": y})
    for x, y in W.PLURALS.items():
        add("plural", x, expand(W.PLURAL_FORMS, x=x), f"The plural of {x} is {y}.", x,
            {"singular": x, "plural": y})
    for x, y in W.COLOURS.items():
        thing = x if x.startswith("the") or x in W.MASS else a(x)
        add("colour", x, expand(W.COLOUR_FORMS, x=x) + (expand(W.COLOUR_FORMS, x=thing) if thing != x else []),
            cap(f"{thing} is {y}."), x, {"thing": x, "colour": y})
    for x, y in W.SOUNDS.items():
        add("sound", x, expand(W.SOUND_FORMS, x=x, ax=a(x)), f"{cap(a(x))} says {y}.", a(x),
            {"animal": x, "sound": y})
    for x, y in W.BABIES.items():
        add("baby", x, expand(W.BABY_FORMS, x=x, ax=a(x)), f"A young {x} is called {a(y)}.", a(x),
            {"animal": x, "young": y})
    for x, y in W.LEGS.items():
        add("legs", x, expand(W.LEG_FORMS, x=x, ax=a(x)), f"{cap(a(x))} has {y} legs.", a(x),
            {"animal": x, "legs": y})
    for names in (W.DAYS, W.MONTHS):
        for i, x in enumerate(names):
            after, before = names[(i + 1) % len(names)], names[i - 1]
            add("after", x, expand(W.AFTER_FORMS, x=x), f"{after} comes after {x}.", x,
                {"after": x, "is": after})
            add("before", x, expand(W.BEFORE_FORMS, x=x), f"{before} comes before {x}.", x,
                {"before": x, "is": before})
    for x, n in zip(W.MONTHS, (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)):
        add("days", x, expand(W.DAYS_FORMS, x=x),
            f"{x} has {n} days." if n > 28 else "February has 28 days, and 29 in a leap year.", x,
            {"month": x, "days": n})
    return facts


def sums():
    """0..20 + 0..20, 0..20 - 0..20, 0..10 x 0..10, and the divisions that undo the last."""
    facts = []

    def add(sign, x, y, result, forms):
        shown = "x" if sign == "*" else sign
        asked = expand(forms, x=x, y=y)
        if max(x, y) < len(W.NUMBERS):
            asked += expand(W.WORD_FORMS[sign], x=W.NUMBERS[x], y=W.NUMBERS[y])
        facts.append(Fact("sum" + sign, "arithmetic", f"{x}{sign}{y}", asked, [f"{x} {shown} {y} = {result}"],
                          [f"{x} {shown} {y}", f"{x}{shown}{y}"], {"a": x, "b": y, "result": result}))

    for x in range(21):
        for y in range(21):
            add("+", x, y, x + y, W.PLUS_FORMS)
            add("-", x, y, x - y, W.MINUS_FORMS + (W.LESS_FORMS if x >= y else []))
            if x <= 10 and y <= 10:
                add("*", x, y, x * y, W.TIMES_FORMS)
                if y:
                    add("/", x * y, y, x, W.DIVIDE_FORMS)
    return facts
