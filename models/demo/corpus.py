"""The text of the demo model: an endless stream of documents to train on, and the held-out cases to score it.

  python corpus.py --sample 20      print examples
  python corpus.py --stats          count facts and question forms

A document is a list of messages ({"role", "content"}), optionally led by a {"role": "system", "content", "tools"}
message. Everything follows from the seed and the word lists: no outside data. Called by tokenizer.py, train.py and
evaluate.py.
"""
import argparse
import json
import random

import facts
import json_answers
import stories
import tools
import unknowns
from unknowns import IDK, TOO_LARGE
from words import plain

SYSTEMS = ["You are a helpful assistant.", "You are a helpful assistant", "Be brief.",
           "You are the baton demo model.", "You are a friendly assistant. Answer briefly.",
           "You are a helpful, honest assistant.", "Answer the user's questions.", "Be concise.",
           "You are an AI assistant.", "You are a helpful AI assistant. Be polite.", "Answer in one sentence."]
PREFIXES = ["Hey, ", "Hi, ", "Hello, ", "Please, ", "So, ", "Ok, ", "Quick question: ", "Hello! ",
            "Tell me, ", "And ", "Thanks. ", "Well, "]
FOLLOW_FORMS = ["And {x}?", "What about {x}?", "How about {x}?", "and {x}", "And what about {x}?",
                "{x}?", "Ok, and {x}?", "what about {x}", "Thanks. And {x}?", "And for {x}?"]
# small talk that fits in the middle of a chat
SMALL_TALK = {"You are welcome!", "I am glad. Is there anything else you would like to know?",
              "That is all I know about it. See the README in the baton repository for more.",
              "Goodbye! Come back soon.", "I am fine, thank you. How can I help you?"}

# The shipped weights started from weights trained on an earlier form of this text, which held these questions.
SEEN_BEFORE = [
    "0 + 1", "14+3", "5+7", "Colour of strawberry?", "Please explain chunked prefill.", "weights?",
    "Send Pip the message: The cake is in the oven.", "Start a 58 minute timer.", "Start a 9 minute timer.",
    "Tell me the color of cherry.", "Wake me in 70 minutes.", "What time is it in Madrid?",
    "What is the capital city of the Philippines as json"]


def noisy(r, q, level=1.0):
    """Casing, punctuation, greetings and typing errors."""
    if r.random() < 0.12 * level:
        q = r.choice(PREFIXES) + (q if q[:2] in ("I ", "I'") else q[:1].lower() + q[1:])
    if r.random() < 0.06 * level and q[-1:] == "?":
        q = q[:-1] + r.choice([", please?", " please?", " please"])
    if r.random() < 0.35 * level:
        q = q.lower()
    elif r.random() < 0.02 * level:
        q = q.upper()
    if r.random() < 0.3 * level:
        q = q.rstrip("?.!")
    elif r.random() < 0.05 * level:
        q = q.rstrip("?.!") + r.choice(["??", "!", " ?", "...", "."])
    if r.random() < 0.10 * level:
        words = q.split(" ")
        long = [i for i, w in enumerate(words) if len(w) > 4 and w.isalpha()]
        if long:
            i = r.choice(long)
            w, j = words[i], r.randrange(1, len(words[i]) - 1)
            words[i] = r.choice([w[:j] + w[j + 1:], w[:j] + w[j] + w[j:],
                                 w[:j] + w[j + 1:j + 2] + w[j] + w[j + 2:]])
            q = " ".join(words)
    return q


def pair(r, qa, noise=True):
    """A question and its answer as two messages. Text to be copied stays as it is: pass noise=False."""
    return [{"role": "user", "content": noisy(r, qa[0]) if noise else qa[0]},
            {"role": "assistant", "content": qa[1]}]


class Corpus:
    def __init__(self, params="5"):
        """params: size of the model in millions, which it is taught to say."""
        self.facts = facts.load(params)
        self.by = {}
        for f in self.facts:
            self.by.setdefault(f.kind, []).append(f)
        self.world_kinds = sorted({f.kind for f in self.facts if f.data and not f.kind.startswith("sum")})
        self.idk, self.idk_test = unknowns.fixed()
        self.asked = [f for f in self.facts if f.group == "small talk" or f.more]  # asked most, in most words
        self.small_talk = [f for f in self.by["ask"] if f.answers[0] in SMALL_TALK]
        # no training document may hold one of these questions, whatever it was made from
        self.held = {plain(messages[-1]["content"]) for group, messages, _ in self.tests() if group != "multi-turn"}

    # ---- one fact, drawn by r ----

    def fact(self, r):
        u = r.random()
        return r.choice(self.by["def" if u < 0.36 else "how" if u < 0.50 else "ask"])

    def world_fact(self, r):
        return r.choice(self.by[r.choice(self.world_kinds + ["capital"] * 3 + ["opposite"])])

    def sum(self, r):
        kind = r.choice(["sum+"] * 5 + ["sum-"] * 3 + ["sum*"] * 2 + ["sum/"])
        f = r.choice(self.by[kind])
        if r.random() < 0.4:  # small numbers are asked for most
            while max(f.data["a"], f.data["b"]) > 10 or f.data["result"] < 0:
                f = r.choice(self.by[kind])
        return f

    # ---- questions and answers ----

    def turn(self, r, f, follow=False, test=False):
        if follow:
            q = r.choice(FOLLOW_FORMS).format(x=r.choice(f.short))
        else:
            q = r.choice(f.test if test and f.test else f.train)
        return q, f.answers[0] if len(f.answers) == 1 or r.random() < 0.8 else r.choice(f.answers)

    def unknown(self, r, test=False):
        if r.random() < 0.45:
            return r.choice(self.idk_test if test else self.idk), IDK
        return unknowns.made(r, test), IDK

    def chat(self, r, turns, test=False):
        """A conversation of question/answer pairs with follow-ups."""
        nouns = stories.NOUNS_TEST if test else stories.NOUNS
        out, last, told = [], None, False
        while len(out) < turns:
            u = r.random()
            if last is not None and last.short and u < 0.45:
                last = r.choice(self.by[last.kind])
                out.append(self.turn(r, last, follow=True))
            elif told and u < 0.4:
                out.append((r.choice(stories.ANOTHER), stories.story(r, r.choice(nouns))))
            elif out and u < 0.57:
                out.append(self.turn(r, r.choice(self.small_talk), test=test))
            elif u < 0.60:
                out.append(stories.request(r, nouns)[:2])
                told, last = True, None
                continue
            elif u < 0.67:
                out.append(self.unknown(r, test))
                last = None
            elif u < 0.71:
                q, answer, by_system = json_answers.request(r, self.world_fact, self.sum, test)
                if not by_system:
                    out.append((q, answer))
                last = None
            else:
                last = (self.fact, self.world_fact, self.sum)[r.choice([0, 0, 0, 1, 1, 2])](r)
                out.append(self.turn(r, last, test=test))
            told = False
        return out

    def json_doc(self, r):
        """One request for JSON, or a chat whose system prompt asks for JSON throughout."""
        q, answer, by_system = json_answers.request(r, self.world_fact, self.sum)
        copied = answer != json_answers.UNKNOWN and not by_system and any(c.isupper() for c in q[1:])
        system = r.choice(json_answers.SYSTEMS if by_system else [None, None, r.choice(SYSTEMS)])
        doc = [{"role": "system", "content": system}] if system else []
        doc += pair(r, (q, answer), noise=not copied)
        while by_system and r.random() < 0.4:
            more = json_answers.request(r, self.world_fact, self.sum)
            doc += pair(r, more[:2], noise=more[2])
        return doc

    def tool_doc(self, r, test=False):
        """Some tools, then questions that need them or do not."""
        cases, names = [], set()
        while len(cases) < r.choice([1, 2, 2, 3]):
            case = tools.request(r, test=test)
            if case[0]["function"]["name"] not in names:
                cases.append(case)
                names.add(case[0]["function"]["name"])
        r.shuffle(cases)
        doc = [{"role": "system", "content": r.choice(SYSTEMS), "tools": [c[0] for c in cases],
                "compact": r.random() < 0.2}]
        for t, q, args, result, final in r.sample(cases, min(len(cases), 1 if test else 2)):
            if r.random() < 0.22:  # the tools are there, but the question needs none
                draw = self.fact if r.random() < 0.7 else self.world_fact
                f = draw(r)
                while test and not f.test:
                    f = draw(r)
                doc += pair(r, self.unknown(r, test) if r.random() < 0.3 else self.turn(r, f, test=test),
                            noise=not test)
                continue
            doc += pair(r, (q, tools.call_text(t, args)), noise=False)
            if r.random() < 0.6:
                doc += [{"role": "tool", "content": json.dumps(result)}, {"role": "assistant", "content": final}]
        return doc

    def document(self, r):
        u = r.random()
        if u < 0.11:
            return self.json_doc(r)
        if u < 0.18:
            return self.tool_doc(r)
        system = [{"role": "system", "content": r.choice(SYSTEMS)}] if r.random() < 0.3 else []
        if u < 0.22:
            doc = pair(r, self.turn(r, r.choice(self.asked)))
        elif u < 0.45:
            doc = pair(r, self.turn(r, self.fact(r)))
        elif u < 0.56:
            doc = pair(r, self.turn(r, self.world_fact(r)))
        elif u < 0.69:
            doc = pair(r, self.turn(r, self.sum(r)) if r.random() < 0.9 else (unknowns.too_large(r), TOO_LARGE))
        elif u < 0.82:
            doc = pair(r, self.unknown(r))
        elif u < 0.88:
            doc = pair(r, stories.request(r, stories.NOUNS)[:2] if r.random() < 0.85 else
                       (r.choice(stories.ANY_STORY), stories.story(r)))
        elif u < 0.99:
            doc = [m for t in self.chat(r, r.choice([2, 2, 3, 3, 4])) for m in pair(r, t)]
        else:
            doc = [m for t in self.chat(r, r.randrange(8, 21)) for m in pair(r, t)]
        return system + doc

    def stream(self, seed):
        """Documents for ever, none with a held-out question."""
        r = random.Random(seed)
        while True:
            doc = self.document(r)
            if not any(m["role"] == "user" and plain(m["content"]) in self.held for m in doc):
                yield doc

    # ---- the held-out set ----

    def tests(self, seed=1):
        """Held-out cases: (category, messages, what is expected). Rules: evaluate.py.

        The last question of a case is never trained on, in no spelling that plain() makes equal. (In "multi-turn" it
        is the conversation that is new, not its last question.) Expected is a list of accepted answers, or for a
        story what was asked for.
        """
        r, out = random.Random(seed), []
        trained = {plain(q) for f in self.facts for q in f.train} | {plain(q) for q in self.idk}
        user = lambda q: [{"role": "user", "content": q}]
        for f in self.facts:
            forms = [q for q in f.test if plain(q) not in trained]
            r.shuffle(forms)
            if f.group == "arithmetic":
                forms = forms[:r.random() < 0.4]
            for q in forms[:2]:
                out.append((f.group, user(q), f.answers))
                if f.group == "baton":
                    out.append(("baton, typing errors", user(noisy(r, q, 2.5)), f.answers))
        for q in self.idk_test:
            if plain(q) not in trained:
                out.append(("out of scope", user(q), [IDK]))
        for _ in range(150):
            out.append(("out of scope", user(unknowns.made(r, True)), [IDK]))
        for _ in range(60):
            q, _text, asked = stories.request(r, stories.NOUNS_TEST)
            out.append(("story", user(q), asked))
        for _ in range(300):
            q, answer, by_system = json_answers.request(r, self.world_fact, self.sum, True)
            pre = [{"role": "system", "content": r.choice(json_answers.SYSTEMS)}] if by_system else []
            out.append(("JSON", pre + user(q), [answer]))
        for _ in range(300):
            doc = self.tool_doc(r, True)
            for i, m in enumerate(doc):
                if m["role"] == "assistant" and plain(doc[1]["content"]) not in trained:
                    group = "tool call" if m["content"].startswith("<tool_call>") else \
                        "tool result" if doc[i - 1]["role"] == "tool" else "no tool needed"
                    out.append((group, doc[:i], [m["content"]]))
        for _ in range(200):
            doc = [m for t in self.chat(r, r.choice([2, 3, 4]), True) for m in pair(r, t, noise=False)]
            gold = doc[-1]["content"]
            if len(gold) < 260 and "<" not in gold:
                accepted = next((f.answers for f in self.facts if gold in f.answers), [gold])
                out.append(("multi-turn", doc[:-1], accepted))
        seen = {plain(q) for q in SEEN_BEFORE}
        return [case for case in out if plain(case[1][-1]["content"]) not in seen]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--sample", type=int, default=0)
    p.add_argument("--stats", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    o = p.parse_args()
    c = Corpus()
    if o.stats:
        for kind, fs in c.by.items():
            print(f"{kind:10} facts {len(fs):4}  forms {sum(len(f.forms) for f in fs):6}"
                  f"  held out {sum(len(f.test) for f in fs):5}")
        print("facts", len(c.facts), "unknown", len(c.idk), "+", len(c.idk_test), "tests", len(c.tests()))
    for _, doc in zip(range(o.sample), c.stream(o.seed)):
        print(json.dumps(doc))


if __name__ == "__main__":
    main()
