"""Short stories from templates, and the requests for them. Used by corpus.py."""
from words import BOYS, GIRLS, a, cap, held_out, made_up

STORY_FORMS = ["Tell me a story about {x}.", "Tell me a short story about {x}.",
               "Write a story about {x}.", "Can you tell me a story about {x}?", "A story about {x}.",
               "I want a story about {x}.", "Write a short story about {x}.", "Story about {x}",
               "Please tell me a short story about {x}.", "Make up a story about {x}.",
               "Tell a story about {x}.", "Do you know a story about {x}?", "Give me a story about {x}.",
               "Could you write a short story about {x}?", "Tell me about {x} in a story.",
               "a bedtime story about {x}", "Tell my child a story about {x}."]
MORE_FORMS = ["I would like a story about {x}.", "Tell us a story with {x} in it.", "Can I have a story about {x}?",
              "Write a tale about {x}.", "Tell me a tale of {x}.", "Write something about {x}.", "a tale about {x}",
              "I want to hear about {x}, as a story.", "Make a story with {x}.", "Read me a story about {x}."]
ANY_STORY = ["Tell me a story.", "Tell me a short story.", "Write a story.", "A story please.",
             "Can you tell me a story?", "I want to hear a story.", "Tell me a bedtime story.",
             "Write a short story.", "story"]
ANOTHER = ["Another one please.", "Another story please.", "Tell me another one.", "One more!",
           "Another one", "Again!", "more stories", "Can I have another story?"]
HEROES = ("fox,fox,fox,cat,cat,dog,dog,rabbit,mouse,bear,wolf,owl,frog,duck,hen,horse,pony,donkey,sheep,goat,"
          "pig,cow,lion,tiger,elephant,monkey,giraffe,zebra,hippo,crocodile,turtle,snake,snail,ant,"
          "bee,butterfly,spider,ladybug,cricket,fish,whale,dolphin,seal,penguin,crab,octopus,squirrel,"
          "hedgehog,badger,beaver,otter,mole,bat,raven,swan,goose,parrot,eagle,sparrow,deer,moose,"
          "panda,koala,kangaroo,camel,llama,puppy,kitten,chick,lamb,dragon,robot,robot,unicorn,giant,"
          "dwarf,wizard,witch,fairy,mermaid,ghost,knight,king,queen,prince,princess,pirate,sailor,"
          "farmer,baker,painter,teacher,girl,girl,boy,boy,child,snowman,cloud,star,boat,train,teapot,"
          "lamp,clock,kite,tree,computer,router,token,Mac,machine,spaceship,car").split(",")
HELPERS = ("fox,cat,dog,rabbit,mouse,bear,owl,frog,duck,goat,turtle,squirrel,hedgehog,badger,beaver,"
           "otter,raven,swan,deer,robot,fairy,farmer,baker,girl,boy,sailor,wizard,elephant").split(",")
TRAITS = "little,brave,shy,curious,clever,kind,small,young,cheerful,lonely,funny,gentle".split(",")
HELPER_TRAITS = "friendly,wise,old,kind,strong,quiet,clever,gentle,merry,patient".split(",")
PLACES = ["at the edge of a green forest", "by a quiet river", "on a hill above a village",
          "near the sea", "in a small town", "in a valley full of flowers", "under an old oak tree",
          "beside a blue lake", "on a farm", "in a cold country in the north",
          "in a garden behind a red house", "on a small island"]
LIKES = ["to sing in the morning", "to look at the stars", "to walk in the rain", "to collect shells",
         "to read old books", "to bake bread", "to tell jokes", "to count the clouds",
         "to play hide and seek", "to paint pictures", "to listen to the wind", "to make new friends"]
THINGS = ["red scarf", "silver key", "blue lantern", "golden bell", "wooden flute", "little drum",
          "green hat", "old map", "warm blanket", "shiny coin"]
INTROS = ["Once upon a time there was {an} {noun} named {N} who lived {place}.",
          "There once was {an} {noun} called {N}. {He} lived {place}.",
          "{N} was {an} {noun} who lived {place}.",
          "A long time ago {an} {noun} named {N} lived {place}."]
LIKING = ["{N} loved {like}.", "Every day {he} loved {like}.", "More than anything {N} liked {like}."]
MEETING = ["Then {ahadj} {helper} named {H} came by.", "Just then {N} met {ahadj} {helper} called {H}.",
           "But {ahadj} {helper} named {H} saw {him} and stopped."]
CLOSING = ["From that day on {N} and {H} were best friends.",
           "{N} thanked {H}, and they stayed friends for ever.",
           "That night {N} fell asleep with a smile.",
           "And if you pass there today, you may still see {N} and {H} together.",
           "{N} never forgot what {H} had done for {him}."]
PROBLEMS = {
    "lost": dict(ask=["who gets lost", "who is lost", "who cannot find the way home"],
        problem=["One day {N} walked too far and could not find the way home.",
                 "One evening a thick fog came, and {N} lost {his} way."],
        **{"try": ["{He} called for help, but nobody heard.", "{He} walked in a circle and grew tired."]},
        help=["\"Follow me,\" said {H}, \"I know every path here.\"",
              "\"Do not be afraid,\" said {H}. \"We will go together.\""],
        end=["Side by side they walked until {N} saw the lights of home.",
             "Before the moon was up, {N} was safe at home."]),
    "thing": dict(ask=["who lost something", "who loses a treasure", "who looks for a lost thing"],
        problem=["One morning {his} {thing} was gone.", "One day {N} lost {his} {thing}."],
        **{"try": ["{He} looked everywhere, but could not find the {thing}.",
                   "{He} searched all day for the {thing}, but it was gone."]},
        help=["\"Let us look again together,\" said {H}.", "\"I saw something under the bridge,\" said {H}."],
        end=["Soon they found the {thing} under some leaves, and {N} danced with joy.",
             "There was the {thing}, and {N} laughed with joy."]),
    "storm": dict(ask=["in a storm", "who is afraid of a storm", "and a storm"],
        problem=["One night a great storm came and broke {his} home.",
                 "One day a storm blew the roof off {his} home."],
        **{"try": ["{N} tried to mend it, but the wind was too strong.",
                   "{He} sat in the rain and did not know what to do."]},
        help=["\"Come and stay with me,\" said {H}, \"and tomorrow we will build.\"",
              "\"I will help you,\" said {H}, and brought some wood."],
        end=["When the sun came back, they built a new home, stronger than before.",
             "In three days the home was as good as new."]),
    "dark": dict(ask=["who is afraid of the dark", "who cannot sleep", "and the dark night"],
        problem=["But {N} was afraid of the dark.", "But at night {N} could not sleep, for {he} feared the dark."],
        **{"try": ["{He} hid under a blanket, but the fear stayed.", "{He} counted to ten, but it did not help."]},
        help=["\"Look up,\" said {H}, \"the stars are little lamps.\"",
              "\"The dark is only a blanket for the day,\" said {H}."],
        end=["{N} looked at the sky for a long time and was not afraid any more.",
             "They watched the stars together, and the fear went away."]),
    "friend": dict(ask=["who has no friends", "who looks for a friend", "and friendship"],
        problem=["But {N} had no friends and often felt alone.", "But nobody played with {N}, and {he} was sad."],
        **{"try": ["{He} asked the birds to play, but they flew away.",
                   "{He} waited by the road, but nobody stopped."]},
        help=["\"I am alone too,\" said {H}. \"Shall we play?\"", "\"May I sit with you?\" asked {H}."],
        end=["They played until the sun went down.", "They laughed and talked the whole afternoon."]),
    "river": dict(ask=["who must cross a river", "and a river", "at the river"],
        problem=["One day {N} had to cross a wide river, but the bridge was broken.",
                 "One spring the river rose, and {N} could not get across."],
        **{"try": ["{He} tried to jump, but it was much too far.",
                   "{He} tried to build a raft, but it fell apart."]},
        help=["\"A long log will do,\" said {H}, and they pulled one to the water.",
              "\"Two can do what one cannot,\" said {H}."],
        end=["Step by step they crossed the river and cheered on the other side.",
             "With much care they both reached the other side."]),
    "hungry": dict(ask=["who is hungry", "in a cold winter", "who has nothing to eat"],
        problem=["One winter the snow was deep and {N} had nothing left to eat.",
                 "One cold day {N} was very hungry and found no food."],
        **{"try": ["{He} looked under the snow, but found nothing.",
                   "{He} knocked at many doors, but nobody opened."]},
        help=["\"I have some soup,\" said {H}. \"Come in and eat.\"",
              "\"Half of my bread is yours,\" said {H}."],
        end=["They ate together by the fire, and {N} felt warm again.",
             "In spring {N} brought {H} the first berries to say thank you."]),
    "contest": dict(ask=["who wants to win a race", "in a race", "and a race"],
        problem=["One day there was a great race, and {N} wanted to win it.",
                 "Every year there was a race, and {N} always came in last."],
        **{"try": ["{He} ran and ran, but soon was out of breath.", "{He} started too fast and fell."]},
        help=["\"Go slowly at first,\" said {H}, \"and never stop.\"",
              "\"Let us train together every morning,\" said {H}."],
        end=["On the day of the race {N} came in first, and everybody cheered.",
             "{N} did not win, but for the first time {he} was not last, and {he} was proud."]),
    "message": dict(ask=["who carries a message", "with a secret letter", "and a letter"],
        problem=["One day {N} had to bring an important letter to the queen.",
                 "One day {N} found a letter that belonged to the queen."],
        **{"try": ["But the way was long, and soon {he} was too tired to go on.",
                   "But the mountains were high, and {he} could not climb them alone."]},
        help=["\"Give it to me,\" said {H}, \"I will carry it the next part of the way.\"",
              "\"Let us run one after the other,\" said {H}, \"like in a relay.\""],
        end=["So the letter went from hand to hand and came in time, and the queen thanked them both.",
             "Together they reached the castle before night, and the queen gave them a feast."]),
    "shy": dict(ask=["who is shy", "who learns to sing", "who wants to sing"],
        problem=["But {N} was too shy to sing in front of others.",
                 "There was a feast in the village, but {N} did not dare to sing there."],
        **{"try": ["{He} opened {his} mouth, but no sound came out.",
                   "{He} practised alone, but {his} voice shook."]},
        help=["\"Sing only for me,\" said {H}, \"and forget the rest.\"",
              "\"I will sing with you,\" said {H}."],
        end=["{N} sang softly, then louder, and in the end everybody clapped.",
             "Their song was so lovely that even the birds listened."]),
}

# for training only, so that any hero is taken over from the request
MORE_HEROES = ("bell,candle,cook,doctor,soldier,hunter,shepherd,miller,tailor,clown,dancer,singer,grandmother,grandfather,"
               "baby,brother,sister,doll,teddy,balloon,bicycle,bus,airplane,ship,bridge,castle,river,mountain,moon,sun,"
               "wind,leaf,flower,rose,pumpkin,apple,carrot,potato,pencil,book,chair,shoe,hat,umbrella,mirror,key,stone,"
               "pebble,feather,worm,beetle,moth,firefly,lizard,toad,hamster,guinea pig,ferret,rat,bison,buffalo,"
               "antelope,gazelle,leopard,cheetah,panther,jackal,hyena,baboon,gorilla,lemur,sloth,walrus,shark,salmon,"
               "lobster,shrimp,jellyfish,starfish,pelican,stork,heron,flamingo,peacock,pigeon,crow,magpie,woodpecker,"
               "ostrich,falcon,hawk,vulture,phoenix,troll,elf,goblin,ogre,genie,vampire,astronaut,captain,detective,"
               "inventor,gardener,postman,fireman,nurse,decode node,prefill node,server,laptop,phone,drone").split(",")
MORE_HEROES = [n for n in MORE_HEROES if not held_out("hero", n)]
NOUNS = [n for n in HEROES if not held_out("hero", n)]
NOUNS_TEST = sorted({n for n in HEROES if held_out("hero", n)})


def story(r, noun=None, name=None, helper=None, problem=None, trait=None):
    noun = noun or r.choice(NOUNS)
    girl = noun in ("girl", "queen", "princess") or noun not in ("boy", "king", "prince") and r.random() < 0.5
    name = name or r.choice(GIRLS if girl else BOYS)
    girl = name in GIRLS
    helper = helper or r.choice([h for h in HELPERS if h != noun])
    hname = r.choice([n for n in GIRLS + BOYS if n != name])
    s = dict(adj=trait or r.choice(TRAITS), noun=noun, N=name, H=hname, helper=helper,
             he="she" if girl else "he", him="her" if girl else "him",
             his="her" if girl else "his", place=r.choice(PLACES), like=r.choice(LIKES),
             thing=r.choice(THINGS), hadj=r.choice(HELPER_TRAITS))
    s.update(He=cap(s["he"]), His=cap(s["his"]), an=a(s["adj"]), ah=a(helper), ahadj=a(s["hadj"]))
    p = PROBLEMS[problem or r.choice(list(PROBLEMS))]
    parts = [r.choice(INTROS), r.choice(LIKING), r.choice(p["problem"]), r.choice(p["try"]),
             r.choice(MEETING), r.choice(p["help"]), r.choice(p["end"]), r.choice(CLOSING)]
    return " ".join(parts).format(**s)


def request(r, nouns):
    """(question, story, what was asked for); the request may fix trait, hero name, helper or problem."""
    noun, kw = r.choice(nouns), {}
    if nouns is NOUNS and r.random() < 0.6:
        noun = r.choice(MORE_HEROES) if r.random() < 0.6 else made_up(r)
    what, u = a(noun), r.random()
    if r.random() < 0.15:
        kw["trait"] = r.choice(TRAITS)
        what = a(kw["trait"] + " " + noun)
    if u < 0.15:
        kw["name"] = r.choice(GIRLS if noun == "girl" else BOYS if noun == "boy" else GIRLS + BOYS)
        what += r.choice([" named ", " called "]) + kw["name"]
    elif u < 0.27:
        kw["helper"] = r.choice([h for h in HELPERS if h != noun])
        what += " and " + a(kw["helper"])
    elif u < 0.39:
        kw["problem"] = r.choice(list(PROBLEMS))
        what += " " + r.choice(PROBLEMS[kw["problem"]]["ask"])
    forms = STORY_FORMS if nouns is not NOUNS or r.random() < 0.7 else MORE_FORMS
    return r.choice(forms).format(x=what), story(r, noun, **kw), {"noun": noun, **kw}
