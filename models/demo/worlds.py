"""Small facts about the world and the ways to ask for them. Plain data for facts.py, no logic."""

DEF_FORMS = ["What is {x}?", "What's {x}?", "Explain {x}.", "Tell me about {x}.",
             "Can you explain {x}?", "Define {x}.", "What does {x} mean?", "Describe {x}.",
             "What do you know about {x}?", "Could you tell me what {x} is?", "Please explain {x}.",
             "Explain {x} in simple words.", "What exactly is {x}?", "Do you know what {x} is?",
             "Give me a short definition of {x}.", "Help me understand {x}.",
             "What is meant by {x}?", "I want to know what {x} is.", "I do not understand {x}.",
             "{x}?", "{x}", "What is {x} in baton?", "What is {x} for?", "What does {x} do?",
             "Explain {x} to me like I am five.", "Please tell me what {x} is.",
             "What is the meaning of {x}?", "In one sentence, what is {x}?", "Who or what is {x}?",
             "How does {x} work?", "What is {x} about?", "Tell me what {x} means."]
HOW_FORMS = ["How do I {x}?", "How can I {x}?", "How to {x}?", "How would I {x}?",
             "What is the command to {x}?", "Which command do I use to {x}?", "I want to {x}.",
             "Show me how to {x}.", "What do I type to {x}?", "Tell me how to {x}.",
             "What do I do to {x}?", "Can I {x}?", "I need to {x}.", "How does one {x}?",
             "Explain how to {x}.", "What is the way to {x}?", "Is there a way to {x}?",
             "Please tell me how I can {x}.", "{x}", "I would like to {x}. How?", "How do you {x}?"]
FOLLOW_FORMS = ["And {x}?", "What about {x}?", "How about {x}?", "and {x}", "And what about {x}?",
                "{x}?", "Ok, and {x}?", "what about {x}", "Thanks. And {x}?", "And for {x}?"]

CAPITAL_FORMS = ["What is the capital of {x}?", "What's the capital of {x}?", "Capital of {x}?",
                 "Name the capital of {x}.", "Which city is the capital of {x}?",
                 "Tell me the capital of {x}.", "Do you know the capital of {x}?", "{x} capital?",
                 "What is the capital city of {x}?", "What is {x}'s capital?",
                 "Can you tell me the capital of {x}?", "the capital of {x}",
                 "What city is the capital of {x}?", "Please name the capital city of {x}."]
COUNTRY_FORMS = ["Which country has the capital {x}?", "{x} is the capital of which country?",
                 "What country is {x} the capital of?", "Of which country is {x} the capital?",
                 "{x} is the capital of what?", "Which country's capital is {x}?",
                 "In which country is {x}?", "Where is {x}?", "What country is {x} in?"]
CAPITALS = dict(p.split(":") for p in (
    "France:Paris,Germany:Berlin,Italy:Rome,Spain:Madrid,Portugal:Lisbon,Austria:Vienna,"
    "Switzerland:Bern,Belgium:Brussels,the Netherlands:Amsterdam,Denmark:Copenhagen,"
    "Norway:Oslo,Sweden:Stockholm,Finland:Helsinki,Iceland:Reykjavik,Ireland:Dublin,"
    "the United Kingdom:London,Poland:Warsaw,the Czech Republic:Prague,Hungary:Budapest,"
    "Slovakia:Bratislava,Slovenia:Ljubljana,Croatia:Zagreb,Serbia:Belgrade,Greece:Athens,"
    "Bulgaria:Sofia,Romania:Bucharest,Ukraine:Kyiv,Russia:Moscow,Turkey:Ankara,Estonia:Tallinn,"
    "Latvia:Riga,Lithuania:Vilnius,Egypt:Cairo,Morocco:Rabat,Tunisia:Tunis,Kenya:Nairobi,"
    "Ethiopia:Addis Ababa,Ghana:Accra,Nigeria:Abuja,Senegal:Dakar,India:New Delhi,"
    "China:Beijing,Japan:Tokyo,South Korea:Seoul,Thailand:Bangkok,Vietnam:Hanoi,"
    "Indonesia:Jakarta,the Philippines:Manila,Nepal:Kathmandu,Iran:Tehran,Iraq:Baghdad,"
    "Australia:Canberra,New Zealand:Wellington,Canada:Ottawa,the United States:Washington,"
    "Mexico:Mexico City,Cuba:Havana,Brazil:Brasilia,Argentina:Buenos Aires,Chile:Santiago,"
    "Peru:Lima,Colombia:Bogota,Ecuador:Quito,Uruguay:Montevideo,Venezuela:Caracas").split(","))

OPPOSITE_FORMS = ["What is the opposite of {x}?", "What's the opposite of {x}?", "Opposite of {x}?",
                  "Name the opposite of {x}.", "Give me the opposite of {x}.",
                  "What is the contrary of {x}?", "Which word is the opposite of {x}?",
                  "Tell me the opposite of {x}.", "the opposite of {x}",
                  "What word means the opposite of {x}?"]
OPPOSITES = [tuple(p.split(":")) for p in (
    "hot:cold,big:small,up:down,fast:slow,happy:sad,light:dark,day:night,old:young,good:bad,"
    "open:closed,full:empty,wet:dry,hard:soft,high:low,long:short,left:right,rich:poor,"
    "strong:weak,early:late,first:last,inside:outside,loud:quiet,clean:dirty,near:far,"
    "thick:thin,true:false,heavy:easy to lift,win:lose,begin:end,push:pull,buy:sell,"
    "love:hate,awake:asleep,above:below,black:white,summer:winter,north:south,east:west,"
    "friend:enemy,question:answer,brave:afraid,sweet:sour").split(",") if "heavy" not in p]
PLURAL_FORMS = ["What is the plural of {x}?", "What's the plural of {x}?", "Plural of {x}?",
                "Give me the plural of {x}.", "Name the plural form of {x}.",
                "What is the plural form of {x}?", "Tell me the plural of {x}.",
                "the plural of {x}", "How do you write the plural of {x}?"]
PLURALS = dict(p.split(":") for p in (
    "mouse:mice,child:children,man:men,woman:women,foot:feet,tooth:teeth,goose:geese,"
    "ox:oxen,leaf:leaves,wolf:wolves,knife:knives,wife:wives,life:lives,shelf:shelves,"
    "city:cities,baby:babies,lady:ladies,story:stories,box:boxes,fox:foxes,bus:buses,"
    "dish:dishes,church:churches,potato:potatoes,tomato:tomatoes,hero:heroes,cat:cats,dog:dogs,"
    "book:books,tree:trees,house:houses,car:cars,day:days,key:keys,boy:boys,girl:girls,"
    "sheep:sheep,fish:fish,deer:deer,person:people,node:nodes,token:tokens,cache:caches,"
    "matrix:matrices,apple:apples,flower:flowers,bird:birds,bed:beds").split(","))
COLOUR_FORMS = ["What colour is {x}?", "What color is {x}?", "Which colour does {x} have?",
                "What is the colour of {x}?", "Tell me the color of {x}.", "Colour of {x}?",
                "Which color is {x}?", "Can you tell me what colour {x} is?"]
COLOURS = dict(p.split(":") for p in (
    "the sky:blue,grass:green,snow:white,the sun:yellow,blood:red,coal:black,milk:white,"
    "banana:yellow,tomato:red,lemon:yellow,orange:orange,carrot:orange,cucumber:green,"
    "strawberry:red,frog:green,flamingo:pink,polar bear:white,raven:black,chocolate:brown,"
    "the sea:blue,fire truck:red,swan:white,cherry:red,gold:yellow,lavender:purple").split(","))
MASS = {"grass", "snow", "blood", "coal", "milk", "chocolate", "gold", "lavender"}
SOUND_FORMS = ["What sound does {ax} make?", "What does {ax} say?", "Which sound does {ax} make?",
               "What noise does {ax} make?", "How does {ax} sound?", "What is the sound of {ax}?",
               "Tell me the sound that {ax} makes."]
SOUNDS = dict(p.split(":") for p in (
    "cow:moo,dog:woof,cat:meow,duck:quack,sheep:baa,pig:oink,horse:neigh,rooster:cock-a-doodle-doo,"
    "frog:ribbit,lion:roar,owl:hoot,mouse:squeak,bee:buzz,snake:hiss,wolf:howl,donkey:hee-haw,"
    "crow:caw,turkey:gobble").split(","))
BABY_FORMS = ["What is a young {x} called?", "What is a baby {x} called?",
              "How do you call a baby {x}?", "What do you call a young {x}?",
              "What is the name for a baby {x}?", "Name the young of {ax}.",
              "What's a baby {x}?"]
BABIES = dict(p.split(":") for p in (
    "cat:kitten,dog:puppy,cow:calf,horse:foal,sheep:lamb,pig:piglet,goat:kid,lion:cub,bear:cub,"
    "duck:duckling,goose:gosling,swan:cygnet,deer:fawn,kangaroo:joey,frog:tadpole,owl:owlet,"
    "fox:cub,chicken:chick").split(","))
LEG_FORMS = ["How many legs does {ax} have?", "How many legs has {ax}?",
             "What is the number of legs of {ax}?", "Tell me how many legs {ax} has.",
             "How many feet does {ax} have?", "legs of {ax}?"]
LEGS = {"dog": 4, "cat": 4, "spider": 8, "ant": 6, "bird": 2, "bee": 6, "horse": 4, "cow": 4,
        "beetle": 6, "chicken": 2, "fly": 6, "elephant": 4, "fox": 4, "human": 2, "snake": 0,
        "fish": 0, "octopus": 0, "crab": 10, "duck": 2, "frog": 4}
del LEGS["octopus"]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = ("January February March April May June July August September October November "
          "December").split()
AFTER_FORMS = ["What comes after {x}?", "What is after {x}?", "Which one comes after {x}?",
               "What follows {x}?", "Name what comes after {x}.", "What comes next after {x}?",
               "Tell me what follows {x}.", "after {x}?"]
BEFORE_FORMS = ["What comes before {x}?", "What is before {x}?", "Which one comes before {x}?",
                "What precedes {x}?", "Name what comes before {x}.", "What comes just before {x}?",
                "Tell me what is before {x}.", "before {x}?"]
DAYS_FORMS = ["How many days does {x} have?", "How many days are in {x}?", "Days in {x}?",
              "How many days are there in {x}?", "How long is {x}?", "Tell me the days in {x}.",
              "What is the number of days in {x}?"]

PLUS_FORMS = ["What is {x} + {y}?", "What is {x} plus {y}?", "{x} + {y}", "{x}+{y}", "{x} + {y} = ?",
              "Add {x} and {y}.", "What is the sum of {x} and {y}?", "How much is {x} plus {y}?",
              "Calculate {x} + {y}.", "What's {x}+{y}?", "Compute {x} plus {y}.", "{x}+{y}=",
              "Can you add {x} and {y}?", "How much is {x} and {y}?", "{x} plus {y}", "{x} plus {y}?",
              "What does {x} + {y} make?", "What do you get when you add {x} and {y}?",
              "I have {x} apples and buy {y} more. How many apples do I have?",
              "{x} birds sit in a tree and {y} more come. How many are there?"]
MINUS_FORMS = ["What is {x} - {y}?", "What is {x} minus {y}?", "{x} - {y}", "{x}-{y}",
               "Subtract {y} from {x}.", "How much is {x} minus {y}?", "Calculate {x} - {y}.",
               "What's {x}-{y}?", "Compute {x} minus {y}.", "Take {y} away from {x}.", "{x} - {y} = ?", "{x} minus {y}",
               "How much is {x} - {y}?", "What is left when you take {y} from {x}?"]
# only where something is left
LESS_FORMS = ["I have {x} apples and eat {y}. How many are left?",
              "{x} birds sit in a tree and {y} fly away. How many are left?"]
TIMES_FORMS = ["What is {x} x {y}?", "What is {x} times {y}?", "{x} x {y}", "{x}*{y}",
               "Multiply {x} by {y}.", "How much is {x} times {y}?", "Calculate {x} * {y}.",
               "What's {x}*{y}?", "What is the product of {x} and {y}?", "Compute {x} times {y}.", "{x} * {y}", "{x} times {y}",
               "What is {x} * {y}?", "What is {x} multiplied by {y}?", "{x} x {y} = ?",
               "There are {x} boxes with {y} books each. How many books are there?"]
DIVIDE_FORMS = ["What is {x} / {y}?", "What is {x} divided by {y}?", "{x} / {y}", "{x}/{y}",
                "Divide {x} by {y}.", "How much is {x} divided by {y}?", "Calculate {x} / {y}.",
                "Compute {x} divided by {y}.", "What's {x}/{y}?", "{x} divided by {y}"]
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
           "fifteen sixteen seventeen eighteen nineteen twenty").split()
# asked with the numbers as words; the answer has digits
WORD_FORMS = {
    "+": ["What is {x} plus {y}?", "How much is {x} plus {y}?", "{x} plus {y}", "Add {x} and {y}."],
    "-": ["What is {x} minus {y}?", "How much is {x} minus {y}?", "{x} minus {y}"],
    "*": ["What is {x} times {y}?", "How much is {x} times {y}?", "{x} times {y}"],
    "/": ["What is {x} divided by {y}?"]}
