"""Small shared helpers and name lists of the text generator: articles, names, made-up words, the held-out rule."""
import hashlib
import re

HOLDOUT = 12  # per cent of questions kept for the test set

GIRLS = ("Mia Ruby Lily Anna Emma Luna Nora Ella Rosa Ida Clara Daisy Hazel Ivy Lucy Maya Nina Olive "
         "Poppy Stella Tilly Zoe Bella Pia").split()
BOYS = ("Max Leo Tom Finn Ben Oscar Sam Theo Felix Hugo Jack Milo Noah Otto Paul Rudi Toby Emil Karl "
        "Louis Oliver Pip Gus Bruno").split()
# Names that appear only where they must be copied (JSON, tools) or declined ("Who is Peter Smith?").
FIRST = ("Peter Maria John Sarah David Laura Michael Julia Thomas Sofia Daniel Eva Martin Alice Robert Jane "
         "Carlos Yuki Ahmed Fatima Ivan Olga Pierre Ingrid Raj Priya Chen Mei Kofi Amara Diego Lucia").split()
LAST = ("Smith Jones Miller Weber Garcia Rossi Novak Silva Kim Tanaka Singh Khan Brown Wilson Taylor Moore "
        "Hansen Berg Costa Dubois Kowalski Ivanov Okafor Mensah Lopez Martinez Fischer Becker").split()


def held_out(*key):
    return int(hashlib.sha256("|".join(key).encode()).hexdigest(), 16) % 100 < HOLDOUT


def plain(text):
    """The text as the score compares it: lower case, no punctuation at word ends, single spaces."""
    text = re.sub(r"[^\w\s+*/=<>{}\[\]:\"-]|[.,?!:;](?=\s|$)", " ", text.lower())
    return " ".join(text.split())


def a(noun):
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def cap(s):
    return s[:1].upper() + s[1:]


def expand(templates, **slots):
    return [t.format(**slots) for t in templates]


def made_up(r):
    """A word that does not exist, so that copying and declining are learned as such."""
    part = lambda: r.choice("b d f g k l m n p r s t v w z bl br dr fl gr kr pl sn st tr sh ch".split()) \
        + r.choice("a e i o u a e i o oo ee ai".split())
    return "".join(part() for _ in range(r.randrange(1, 4))) + r.choice(["n", "r", "x", "p", "lt", "k", "m", "nd", "", "s"])


def person(r):
    """Any first name: one of the stories, a common one, or a made-up one."""
    u = r.random()
    return r.choice(GIRLS + BOYS) if u < 0.4 else r.choice(FIRST) if u < 0.7 else cap(made_up(r))
