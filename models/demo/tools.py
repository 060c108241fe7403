"""Tool definitions, requests that need them, and the calls and answers that follow. Used by corpus.py.

Names, parameter names and the layout of the schema vary, so that the call must be read off the schema. Held out are
cities and 12 % of the request strings.
"""
import json

import worlds as W
from unknowns import TOPICS_TEST, TOPICS_TRAIN
from words import cap, held_out, made_up, person

CITIES = list(W.CAPITALS.values()) + (
    "Hamburg,Munich,Milan,Barcelona,New York,Boston,Chicago,Seattle,Sydney,Mumbai,Shanghai,Osaka,"
    "Toronto,Geneva,Zurich,Lyon,Porto,Krakow,Leipzig,Turin,Naples,Bergen,Cologne,Bremen,Dallas,"
    "Denver,Miami,Houston,Lagos,Cape Town,Dubai,Doha,Singapore,Taipei,Busan,Kyoto,Nara,Perth,"
    "Oxford,York,Leeds,Glasgow,Cork,Ghent,Utrecht,Basel,Graz,Linz,Salzburg,Malmo").split(",")
SKIES = "sunny,cloudy,rainy,windy,foggy,snowy,clear,stormy".split(",")
WEATHER = ["What is the weather in {x}?", "How is the weather in {x}?", "Is it raining in {x}?",
           "What's the weather like in {x}?", "Weather in {x}?", "Tell me the weather in {x}.",
           "How warm is it in {x}?", "Do I need an umbrella in {x}?", "What is the weather like in {x} today?",
           "How cold is it in {x} right now?", "Is it sunny in {x}?", "Check the weather in {x}."]
TIME = ["What time is it in {x}?", "Tell me the time in {x}.", "What's the time in {x}?",
        "Time in {x}?", "How late is it in {x}?", "What is the local time in {x}?"]
TIMER = ["Set a timer for {x} minutes.", "Start a {x} minute timer.", "Wake me in {x} minutes.",
         "Timer: {x} minutes", "Please set a {x} minute timer.", "Remind me in {x} minutes."]
MESSAGE = ["Send {x} the message: {y}", "Tell {x}: {y}", "Write to {x}: {y}", "Message {x}: {y}",
           "Send a message to {x}: {y}"]
TEXTS = ("I am late.|See you soon.|Happy birthday!|Call me please.|Dinner is ready.|The cluster is up.|"
         "Thank you for the book.|I am on my way.|Good luck!|The train is late.|We won the game.|"
         "Please buy some milk.|The cake is in the oven.|Where are you?|Come home.").split("|")
SEARCH = ["Search the web for {x}.", "Look up {x}.", "Find a page about {x}.", "Search for {x}.", "Google {x}."]
SONG = ["Play {x}.", "Play the song {x}.", "I want to hear {x}.", "Put on {x}.", "Please play {x}."]
SONGS = ("Yesterday,Hello,Imagine,Blue Moon,Summer Rain,Let It Be,Silent Night,Happy Day,River Song,"
         "Dancing Queen,Moonlight,Golden Years,Country Roads,Morning Light").split(",")
LIGHT = ["Turn on the light in the {x}.", "Switch on the light in the {x}.", "Light in the {x} please.",
         "Make it bright in the {x}."]
ROOMS = "kitchen,bedroom,bathroom,garden,hall,office,cellar,living room,garage,attic".split(",")
PRICE = ["What does {x} cost?", "How much is {x}?", "What is the price of {x}?", "Price of {x}?"]
GOODS = "a banana,bread,milk,gold,an apple,a bicycle,a phone,a laptop,cheese,coffee,a ticket,a lamp".split(",")
TRANSLATE = ["Translate {x} into {y}.", "How do you say {x} in {y}?", "What is {x} in {y}?"]
PHRASES = "hello,good morning,thank you,I am hungry,a dog,the house,good night,where is the station,see you".split(",")
LANGUAGES = "French,German,Spanish,Italian,Polish,Greek,Japanese,Dutch".split(",")
NOTE = ["Write down: {x}", "Make a note: {x}", "Note: {x}", "Remember this: {x}"]
STATUS = ["Is the cluster healthy?", "Show the cluster status.", "Check the cluster.", "How is the cluster?",
          "Are all nodes up?", "What is the state of the nodes?"]
RESTART = ["Restart {x}.", "Please restart the node {x}.", "Restart the {x} node.", "Reboot {x}."]


def tool(r, name, description, props):
    """One tool in the OpenAI form; props: parameter name -> type. The layout varies as clients' layouts do."""
    words = {"number": "A number.", "string": "A text.", "integer": "A whole number."}
    described = r.random() < 0.35
    fields = {k: {"type": t} | ({"description": f"The {k}." if r.random() < 0.7 else words[t]} if described else {})
              for k, t in props.items()}
    if "weather" in name and r.random() < 0.2:
        fields["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}  # optional, so left out of the call
    params = [("type", "object"), ("properties", fields), ("required", list(props))]
    if r.random() < 0.4:
        params = [params[0], params[2], params[1]]
    elif r.random() < 0.15:
        params = params[:2]
    return {"type": "function", "function": {"name": name, "description": description, "parameters": dict(params)}}


def case(r, kind=None, test=False):
    """(tool, question, arguments, result, final answer) of one request."""
    kind = kind or r.choice(KINDS)
    cities = [c for c in CITIES if held_out("city", c) == test]
    x, y = r.randrange(1, 100), r.randrange(1, 100)
    city = r.choice(cities) if test or r.random() < 0.8 else cap(made_up(r))
    text = r.choice(TEXTS) if r.random() < 0.7 else cap(" ".join(made_up(r) for _ in range(r.randrange(2, 5))))
    number = r.choice(["number", "number", "integer"])
    if kind == "weather":
        sky, t, p = r.choice(SKIES), r.randrange(-5, 36), r.choice(["city", "location", "place"])
        return (tool(r, r.choice(["get_weather", "get_current_weather", "weather"]),
                     r.choice(["Get the current weather in a city.", "Get the weather.", "Current weather."]),
                     {p: "string"}), r.choice(WEATHER).format(x=city), {p: city},
                {p: city, "sky": sky, "temperature": t}, f"In {city} it is {sky} with {t} degrees.")
    if kind == "time":
        t, p = f"{r.randrange(24):02}:{r.randrange(60):02}", r.choice(["city", "location", "place"])
        return (tool(r, r.choice(["get_time", "current_time"]), "Get the local time in a city.", {p: "string"}),
                r.choice(TIME).format(x=city), {p: city}, {p: city, "time": t}, f"It is {t} in {city}.")
    if kind in ("add", "multiply"):
        p, q = r.choice([("a", "b"), ("a", "b"), ("x", "y"), ("first", "second")])
        forms, result = (W.PLUS_FORMS, x + y) if kind == "add" else (W.TIMES_FORMS, x * y)
        return (tool(r, r.choice([kind, "calculate_sum" if kind == "add" else "product"]),
                     "Add two numbers." if kind == "add" else "Multiply two numbers.", {p: number, q: number}),
                r.choice(forms).format(x=x, y=y), {p: x, q: y}, {"result": result}, f"The result is {result}.")
    if kind == "timer":
        p = r.choice(["minutes", "minutes", "duration"])
        return (tool(r, r.choice(["set_timer", "start_timer"]), "Start a timer, in minutes.", {p: number}),
                r.choice(TIMER).format(x=x), {p: x}, {"ok": True}, "Done, the timer is running.")
    if kind == "message":
        who, (p, q) = person(r), r.choice([("to", "text"), ("to", "text"), ("recipient", "message"), ("name", "text")])
        return (tool(r, "send_message", "Send a message to a person.", {p: "string", q: "string"}),
                r.choice(MESSAGE).format(x=who, y=text), {p: who, q: text},
                {"ok": True}, f"I have sent your message to {who}.")
    if kind == "search":
        topic = r.choice(TOPICS_TEST if test else TOPICS_TRAIN)
        return (tool(r, r.choice(["search", "web_search"]), "Search the web.", {"query": "string"}),
                r.choice(SEARCH).format(x=topic), {"query": topic},
                {"found": f"A page about {topic}."}, f"I found a page about {topic}.")
    if kind == "song":
        song, p = r.choice(SONGS) if r.random() < 0.6 else cap(made_up(r)), r.choice(["title", "song"])
        return (tool(r, r.choice(["play_song", "play_music"]), "Play a song.", {p: "string"}),
                r.choice(SONG).format(x=song), {p: song}, {"playing": song}, f"Now playing {song}.")
    if kind == "light":
        room = r.choice(ROOMS) if r.random() < 0.8 else made_up(r)
        return (tool(r, r.choice(["turn_on_light", "light_on"]), "Turn on the light in a room.", {"room": "string"}),
                r.choice(LIGHT).format(x=room), {"room": room}, {"ok": True}, f"The light in the {room} is on.")
    if kind == "price":
        thing, price, p = r.choice(GOODS), r.randrange(1, 100), r.choice(["item", "product"])
        return (tool(r, "get_price", "Get the price of a product.", {p: "string"}),
                r.choice(PRICE).format(x=thing), {p: thing}, {p: thing, "price": price},
                f"The price of {thing} is {price}.")
    if kind == "translate":
        phrase, language, word = r.choice(PHRASES), r.choice(LANGUAGES), made_up(r)
        return (tool(r, "translate", "Translate a text into a language.", {"text": "string", "language": "string"}),
                r.choice(TRANSLATE).format(x=phrase, y=language), {"text": phrase, "language": language},
                {"translation": word}, f"It is: {word}")
    if kind == "note":
        return (tool(r, r.choice(["create_note", "save_note"]), "Save a note.", {"text": "string"}),
                r.choice(NOTE).format(x=text), {"text": text}, {"ok": True}, "Done, I have saved the note.")
    if kind == "status":
        n = r.randrange(2, 9)
        return (tool(r, r.choice(["cluster_status", "get_status"]), "Get the state of the cluster.", {}),
                r.choice(STATUS), {}, {"nodes": n, "healthy": n}, f"All {n} nodes are healthy.")
    node = r.choice(["decode", "prefill", "mac", "gpu", made_up(r)]) + f"-{r.randrange(1, 10)}"
    return (tool(r, "restart_node", "Restart a node of the cluster.", {"node": "string"}),
            r.choice(RESTART).format(x=node), {"node": node}, {"ok": True}, f"The node {node} is restarting.")


KINDS = ["weather"] * 4 + ["time"] * 2 + ["add", "multiply", "timer", "message", "message", "search", "song", "light",
                                         "price", "translate", "note", "status", "restart"]


def request(r, kind=None, test=False):
    """case(), from the held-out requests or from the others."""
    while True:
        c = case(r, kind, test)
        if held_out("tool", c[1]) == test:
            return c


def call_text(t, args):
    return "<tool_call>\n" + json.dumps({"name": t["function"]["name"], "arguments": args}) + "\n</tool_call>"
