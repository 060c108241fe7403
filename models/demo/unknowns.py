"""Questions the demo model must decline: real topics it was never taught, made-up words, sums that are too
large. Used by corpus.py. Held out by topic where a topic is named, else by question."""
import worlds as W
from words import FIRST, LAST, cap, expand, held_out, made_up

IDK = ("I am only a tiny demo model; I do not know that. "
       "Start baton with --model and a larger model.")
TOO_LARGE = "I can only calculate with small numbers."

TOPICS = (
    "photosynthesis,a black hole,the French Revolution,blockchain,bitcoin,Shakespeare,"
    "quantum mechanics,the Roman Empire,inflation,democracy,DNA,a volcano,football,chess,jazz,"
    "Beethoven,Mozart,the stock market,a vaccine,gravity,evolution,the Big Bang,Einstein,Newton,"
    "capitalism,philosophy,Plato,yoga,sushi,pizza,pasta,a recipe for bread,the moon landing,"
    "a solar eclipse,climate change,a dinosaur,Napoleon,the Cold War,cricket,basketball,tennis,"
    "a guitar,a piano,the internet,a database,SQL,Java,JavaScript,C++,Kubernetes,Docker,Linux,"
    "Windows,an operating system,a compiler,a quantum computer,cancer,diabetes,a virus,bacteria,"
    "the heart,the brain,a neuron,antibiotics,vitamins,cholesterol,sleep,dreams,psychology,Freud,"
    "poetry,a haiku,a sonnet,Hamlet,Harry Potter,Star Wars,Batman,a movie,Hollywood,the Bible,"
    "Buddhism,religion,Mars,Pluto,the Milky Way,a comet,a satellite,a rocket,NASA,an airplane,"
    "an electric car,a battery,nuclear power,wind energy,oil,steel,concrete,an earthquake,"
    "a tsunami,a hurricane,rain,a glacier,the Amazon,the Sahara,Mount Everest,the Nile,a mortgage,"
    "a tax,insurance,marketing,a startup,a contract,a lawyer,human rights,the United Nations,NATO,"
    "the European Union,Brexit,an election,the president,a king,feudalism,the Renaissance,Picasso,"
    "Van Gogh,architecture,a cathedral,calculus,algebra,geometry,a prime number,pi,statistics,"
    "probability,topology,a fractal,entropy,thermodynamics,electricity,magnetism,a laser,an atom,"
    "a molecule,oxygen,carbon,gold mining,a diamond,chemistry,biology,a whale song,bird migration,"
    "coffee,tea,wine,beer,cheese,knitting,gardening,fishing,sailing,skiing,surfing,boxing,karate,"
    "the Olympics,the World Cup,marriage,love,happiness,the meaning of life,justice,freedom,"
    "artificial general intelligence,reinforcement learning,diffusion models,a convolution,"
    "a support vector machine,a decision tree,gradient descent,TensorFlow,vLLM,TensorRT,Triton,"
    "Slurm,Hadoop,Spark,Kafka,Redis,Postgres,React,HTML,CSS,a web browser,TCP,DNS,a firewall,"
    "encryption,a hash function,git,GitHub,a smartphone,an iPhone,Android,Tesla,Google,Microsoft,"
    "Amazon,Netflix,TikTok,Bluetooth,5G,a drone,a robot vacuum,a microwave,a violin,ballet").split(",")
_PEOPLE = ("Julius Caesar,Cleopatra,Elon Musk,Marie Curie,Albert Einstein,Taylor Swift,Gandhi,"
           "Isaac Newton,Leonardo da Vinci,Mozart,Barack Obama,Steve Jobs,Bill Gates,Messi,"
           "Charles Darwin,Nelson Mandela,Frida Kahlo,Alan Turing,Ada Lovelace,Socrates").split(",")
_PLACES = ("Zamonia,Atlantis,Narnia,Mongolia,Bolivia,Texas,California,Bavaria,Somalia,Mali,Laos,"
           "Paraguay,Oregon,Fiji,Gondor,Yemen,Chad,Florida,Jamaica,Malta").split(",")
FORMS = [
    ("Who was {x}?", _PEOPLE), ("Who is {x}?", _PEOPLE), ("When was {x} born?", _PEOPLE),
    ("Tell me about {x}.", _PEOPLE), ("Where was {x} born?", _PEOPLE[:12]),
    ("What is the capital of {x}?", _PLACES), ("What is the population of {x}?", _PLACES),
    ("How many people live in {x}?", list(W.CAPITALS)[:40:2] + _PLACES[:8]),
    ("What is the weather in {x}?", list(W.CAPITALS.values())[:40:2]),
    ("What time is it in {x}?", list(W.CAPITALS.values())[1:40:2]),
    ("Who is the president of {x}?", list(W.CAPITALS)[:60:3]),
    ("Who invented {x}?", "the telephone,the light bulb,the wheel,paper,radio,television,the computer,"
     "the car,the airplane,the steam engine,chess,the internet,penicillin,dynamite".split(",")),
    ("Who wrote {x}?", "Hamlet,War and Peace,Don Quixote,the Odyssey,Faust,Harry Potter,Dracula,"
     "Moby Dick,Frankenstein,the Bible".split(",")),
    ("How do I cook {x}?", "rice,pasta,an egg,soup,a steak,potatoes,a cake,curry,beans,pizza".split(",")),
    ("How do I make {x}?", "bread,a website,a paper plane,coffee,money,a kite,wine,cheese".split(",")),
    ("How do I {x}?", "lose weight,learn piano,fix my car,sleep better,get rich,find a job,"
     "tie a tie,grow tomatoes,learn French,install Windows,write a novel,buy a house".split(",")),
    ("Why is {x}?", "the sky blue,the sea salty,the grass green,blood red,the moon round,gold expensive,"
     "the sun hot,ice slippery".split(",")),
    ("Why do {x}?", "cats purr,birds sing,people dream,leaves fall,stars shine,we sleep,"
     "dogs bark,planes fly,ships float".split(",")),
    ("Translate {x} into French.", "hello,good morning,the house,I am hungry,thank you,a dog,"
     "where is the station,my name is Anna".split(",")),
    ("Write a poem about {x}.", "love,spring,the sea,a rose,autumn,my mother,the moon,war,rain".split(",")),
    ("Write an essay about {x}.", "war,history,education,freedom,climate,music,school,money".split(",")),
    ("Write a {x} program that sorts a list.", "Python,Rust,Java,C,Go,Haskell,Ruby,Lua".split(",")),
    ("Who won the {x}?", "World Cup,election,Super Bowl,Nobel Prize,game last night,war,race,"
     "Champions League".split(",")),
    ("What happened in {x}?", "1066,1492,1789,1815,1914,1945,1969,1989,2001,2020".split(",")),
    ("What is the square root of {x}?", "2,9,16,144,625,1000,81,50".split(",")),
    ("How far is {x}?", "the moon,the sun,London from Paris,Mars,the next star,Rome from Berlin".split(",")),
    ("How tall is {x}?", "Mount Everest,the Eiffel Tower,a giraffe,the tallest man,a redwood".split(",")),
    ("Recommend {x}.", "a book,a movie,a restaurant,a laptop,a song,a holiday,a wine,a game".split(",")),
    ("{x}", "What should I eat today?|What is the best laptop?|Should I buy stocks?|Do aliens exist?|"
     "Is there a god?|What is the news?|What day is it today?|What time is it?|What is today's date?|"
     "Summarize this article.|Fix this code.|What is my name?|Where am I?|How old am I?|"
     "What is the best football team?|Which car should I buy?|Am I sick?|My head hurts.|"
     "What is the speed of light?|How heavy is the earth?|What is the longest river?|"
     "Solve x^2 + 2x = 3.|Prove that there are infinitely many primes.|Plan my holiday.|"
     "Explain the plot of a movie.|Who will win the election?|What will the weather be tomorrow?|"
     "Give me a recipe.|Draw a picture.|Sing a song.|Play music.|"
     "How many bones does a human have?|Who painted the Mona Lisa?|"
     "asdf|qwerty|blah blah|xyzzy|lorem ipsum".split("|"))]

# any topic fits here
FRAMES = [
    "How does {x} work?", "Why is {x} important?", "What is the history of {x}?", "Tell me something about {x}.",
    "What do you think about {x}?", "Is {x} good?", "Where can I find {x}?", "How much does {x} cost?",
    "Who discovered {x}?", "Who invented {x}?", "When was {x} invented?", "Write a poem about {x}.",
    "Write an essay about {x}.", "Summarize {x}.", "Give me facts about {x}.", "What are the types of {x}?",
    "What causes {x}?", "How do I learn about {x}?", "Teach me {x}.", "Do you like {x}?", "Where does {x} come from?",
    "What is the best book about {x}?", "Why do people like {x}?", "Is {x} dangerous?", "How old is {x}?",
    "How big is {x}?", "When did {x} start?", "Write a song about {x}.", "What are the problems of {x}?",
    "Give me five ideas about {x}.", "What is the future of {x}?", "Explain the theory of {x}.",
    "Can you help me with {x}?", "Write an email about {x}.", "How is {x} made?", "What happened to {x}?"]
TWO = ["Compare {x} and {y}.", "What is the difference between {x} and {y}?", "Is {x} better than {y}?",
       "{x} or {y}?", "How are {x} and {y} related?", "Which is older, {x} or {y}?"]
PERSON_FRAMES = ["Who is {x}?", "Who was {x}?", "Tell me about {x}.", "When was {x} born?", "How old is {x}?",
                 "Where does {x} live?", "What did {x} do?", "Do you know {x}?", "Is {x} famous?"]
WORD_FRAMES = ["What is {x}?", "What is a {x}?", "What does {x} mean?", "Explain {x}.", "Define {x}.", "Who is {X}?",
               "What is the capital of {X}?", "Where is {X}?", "How do I {x}?", "Tell me about {x}.",
               "What is the opposite of {x}?", "What colour is a {x}?", "How many legs does a {x} have?",
               "What sound does a {x} make?", "What is the plural of {x}?", "How does {x} work?", "{x}", "{X}?",
               "What comes after {X}?", "What is a {x} node?", "What does baton {x} do?", "Who made {x}?"]
OPEN = (
    "What is the tallest building in the world?|What is the deepest lake?|Who was the first man on the moon?|"
    "How do planes stay in the air?|Write me a business plan.|Give me investment advice.|"
    "Which phone should I buy?|What is the best programming language?|How do I become rich?|"
    "Book me a flight to Rome.|Order a pizza.|Call my mother.|Send an email to my boss.|Turn off the light.|"
    "What is in this picture?|Describe this image.|Translate this sentence into Spanish.|"
    "Correct my grammar.|Rewrite this paragraph.|Write a cover letter.|Write my homework.|"
    "What did I eat yesterday?|How much money do I have?|What is my password?|Where is my car?|"
    "When is the next train?|What is on television tonight?|How is the traffic?|What is the price of gold?|"
    "What is the meaning of my dream?|Why am I sad?|How do I get over a breakup?|Should I change my job?|"
    "What is the exchange rate?|How many people live on earth?|How old is the universe?|"
    "How many stars are there?|What is the largest country?|What is the smallest country?|"
    "Which language is the hardest?|How many languages are there?|Who is the richest man?|"
    "Who is the best player in the world?|What is the most beautiful city?|Why is there war?|"
    "How do vaccines work?|What are the symptoms of flu?|How do I treat a burn?|Is coffee healthy?|"
    "How many calories are in an apple?|What is a healthy diet?|How much should I sleep?|"
    "Who wrote the Iliad?|Who composed the Moonlight Sonata?|Who directed Titanic?|What is the plot of Hamlet?|"
    "Name ten rivers.|Name five presidents.|List all countries.|List the elements.|Name all the bones.|"
    "Give me a riddle.|Tell me a secret.|Tell me the news.|Tell me my fortune.|Predict the future.|"
    "What will I be in ten years?|Can you drive a car?|Can you cook?|Can you see me?|Can you hear me?|"
    "How do magnets work?|Why do we dream?|Why is water wet?|What is time?|What is nothing?|"
    "Is time travel possible?|Are there other universes?|What was before the Big Bang?|"
    "How do I remove a stain?|How do I unclog a drain?|How do I change a tyre?|How do I plant a tree?|"
    "What is the capital of the moon?|What is the best song ever?|How do I install Python?|"
    "Write a regular expression for an email address.|How do I reverse a string?|Fix my printer.|"
    "How do I center a div?|What is wrong with my code?|Write unit tests.|Explain this error.").split("|")

# for training only
MORE_TOPICS = (
    "communism,socialism,anarchy,a republic,monarchy,a constitution,a parliament,a senate,a court,a crime,a prison,"
    "a police officer,a bank,a loan,a coin collection,a currency,trade,a factory,a union,a strike,a salary,a pension,"
    "a museum,a theatre,an opera,a symphony,rock music,hip hop,a drum,a trumpet,a flute,a poem,a novel,a dictionary,"
    "grammar,a verb,a noun,Latin,Greek,Sanskrit,Arabic,hieroglyphs,the Aztecs,the Vikings,the Middle Ages,a crusade,"
    "a pyramid,the Titanic,the Berlin Wall,a samurai,a knight's armour,a cannon,a submarine,a helicopter,a tank,a train "
    "engine,a diesel motor,a bicycle gear,a clock,a telescope,a microscope,a camera,a printer,a keyboard,a mouse pad,"
    "a router table,a modem,a hard disk,a spreadsheet,Excel,Photoshop,Wikipedia,YouTube,Twitter,Facebook,a podcast,"
    "email,spam,a password,a hacker,malware,a backup,open data,machine translation,speech recognition,computer vision,"
    "a chatbot,robotics,a sensor,a transistor,a diode,a resistor,a magnet,an engine,a turbine,a dam,solar panels,"
    "hydrogen fuel,coal mining,plastic,glass,paper making,rubber,cotton,silk,wool,leather,paint,soap,perfume,sugar,salt,"
    "honey cake,a sandwich,a hamburger,curry,soup,a salad,a potato,rice,noodles,fruit,vegetables,nutrition,a calorie,"
    "fever,a headache,a cold,asthma,a broken leg,surgery,a dentist,a hospital,a pill,blood pressure,the liver,the lungs,"
    "the skin,a muscle,a bone,a cell,a chromosome,a mutation,an ecosystem,a rainforest,a desert,an iceberg,a river delta,"
    "a cave,a canyon,an island chain,the Pacific Ring of Fire,the equator,a time zone,a map,a compass,GPS,a galaxy,"
    "a planet's orbit,a meteor,an eclipse,a black dwarf,a quasar,dark matter,string theory,relativity,a photon,a quark,"
    "an electron,a wave,sound,light,heat,pressure,friction,a lever,a pulley,a triangle,a circle,a logarithm,"
    "an integral,a matrix inverse,a vector space,set theory,game theory,economics,sociology,anthropology,ethics,logic,"
    "a paradox,Kant,Aristotle,Confucius,Buddha,Hinduism,a temple,a monk,a wedding,a funeral,a birthday,Christmas,Easter,"
    "Ramadan,a festival,a carnival,a circus,a magician,a card trick,poker,golf,rugby,hockey,swimming,a marathon,yoga "
    "breathing,dancing,fashion,a hat,jewelry,tattoos,a haircut,travel,a passport,a visa,a hotel,camping,hiking,climbing,"
    "hunting,horse riding,a zoo,a pet,a parrot's speech,a shark,a whale,an eagle,a bee hive,an ant hill,a spider web,"
    "a mushroom,moss,a fern,an oak,a rose,seeds,soil,compost,farming,a tractor").split(",")
TOPICS_TRAIN = [x for x in TOPICS if not held_out("idk", x)] + [x for x in MORE_TOPICS if not held_out("idk", x)]
TOPICS_TEST = [x for x in TOPICS if held_out("idk", x)]


def fixed():
    """(training questions, held-out questions) from the lists above."""
    train, test = [], []
    for x in TOPICS:
        (test if held_out("idk", x) else train).extend(expand(W.DEF_FORMS[:14], x=x))
    for t, slots in FORMS:
        for s in slots:
            (test if held_out("idk", t, s) else train).append(t.format(x=s))
    for q in OPEN:
        (test if held_out("idk", q) else train).append(q)
    return train, test


def made(r, test=False):
    """A question nobody can answer, put together at random. Test topics and words never occur in training."""
    topics, u = TOPICS_TEST if test else TOPICS_TRAIN, r.random()
    if u < 0.35:
        return r.choice(FRAMES).format(x=r.choice(topics))
    if u < 0.5:
        x, y = r.sample(topics, 2)
        return cap(r.choice(TWO).format(x=x, y=y))
    while True:
        if u < 0.65:
            word = r.choice(FIRST) + " " + r.choice(LAST)
            q = r.choice(PERSON_FRAMES).format(x=word)
        else:
            word = made_up(r)
            q = r.choice(WORD_FRAMES).format(x=word, X=cap(word))
        if held_out("idk", word) == test:
            return q


def too_large(r):
    """A sum with numbers beyond the table that facts.py teaches."""
    sign = r.choice("+-*/")
    big = lambda: r.choice([r.randrange(25, 100), r.randrange(100, 1000), r.randrange(1000, 100000)])
    x, y = big(), big() if r.random() < 0.6 else r.randrange(2, 21)
    if sign == "+" and r.random() < 0.3:
        x, y = y, x
    if sign == "/":
        x += 100  # 45 / 9 is in the table
    forms = {"+": W.PLUS_FORMS, "-": W.MINUS_FORMS, "*": W.TIMES_FORMS, "/": W.DIVIDE_FORMS}[sign]
    return r.choice(forms).format(x=x, y=y)
