"""Conversations for the tiny emoji model, built from the rows of `emoji.parquet`.

A picture id is a row's index; `len(rows) + i` is the centre crop of row i (its middle 32x32 enlarged to 64x64).
`EmojiTasks.sample` draws training records, `EmojiTasks.evaluation` lists the held-out ones. What training never holds:

- the sentences of `HELD_OUT_PHRASINGS`, alone or inside a longer text_to_image prompt;
- 200 emoji as drawn by Twitter, skin-tone variants included, in name, category, yes_no, thinking;
- 100 pairs of emoji and skin tone, by either vendor, in any task;
- forward sequences that begin at one of 2 moon phases and 6 clock faces, by either vendor.

All wordings come from `GRAMMAR`: `<symbol>` stands for any of the symbol's alternatives, `{}` for the subject.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence


HELD_OUT_PHRASINGS = (
    "Could you sketch {} for me?",
    "I want to see {}.",
    "Let's have a picture with {} in it.",
)
DEFAULT_PHRASING = "Generate an image of {}."

UNDERSTANDING = {"name": 0.55, "category": 0.2, "yes_no": 0.25}
MIXTURE = {
    "text_to_image": 0.44,
    "name": 0.24,
    "category": 0.1,
    "yes_no": 0.03,
    "edit": 0.04,
    "sequence": 0.13,
    "thinking": 0.02,
}
EVALUATIONS = (
    "seen_phrasings",
    "unseen_phrasings",
    "name_google",
    "name_twitter_held_out",
    "category_twitter_held_out",
    "edit_held_out",
    "sequence_held_out",
)

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
MOON = tuple(f"{0x1F311 + i:X}" for i in range(8))
CLOCK = tuple(f"{start + hour:X}" for hour in range(12) for start in (0x1F550, 0x1F55C))
CYCLES = {"moon": MOON, "clock": CLOCK}
HELD_OUT_STARTS = {"moon": 2, "clock": 6}
HELD_OUT_DRAWINGS = 200
HELD_OUT_PAIRS = 100
CORPUS_CONVERSATIONS = 20_000

# `a|b|c` are equally likely alternatives, and an alternative may be empty.
GRAMMAR = {
    # Whole text_to_image prompts. Repeated symbols are more frequent.
    "prompt": "<bare>|<order>.|<order>.|<order>.|<ask>?|<ask>?|<wish>.|<wish>.|<other>|<fragment>|<framed>|<framed>",
    "bare": (
        '{}|{}|{}|{}.|{}!|{} please|{}, please.|please, {}|"{}"'
        "|'{}'|just {}|only {}|{} now|emoji: {}|image: {}|<object> {}|{}, <noun> of <noun>|now {}|next: {}|{} <how>"
        "|<hello> {}|one more: {}|{} again|the word is {}"
    ),
    "order": (
        "<polite> <make> {} <how> <for> <closer>|<polite> <make> <object> {} <how> <for> <closer>"
        "|<polite> <hand> <whom> {} <how> <closer>|<polite> <hand> <whom> <object> {} <how> <closer>"
        "|<polite> <make> <thing> <relative> {} <closer>|<polite> <hand> <whom> <thing> <relative> {} <closer>"
        "|<polite> let <whom> see {} <how> <closer>|<polite> let <whom> have a look at {} <closer>"
        "|let's <make> {} <how>|let's <make> <object> {} <closer>|let us have <object> {}|let's see {} <how>"
        "|let's look at {}"
        '|<make> "{}" <for>|<make> <thing> called "{}"|<make> the following: {}|<make> this for <whom>: {}'
        "|try to <make> {} <how>|try <making> {} <how>|go ahead and <make> {}|start <making> {}"
        "|turn <phrase> into <thing>"
    ),
    "phrase": 'the words "{}"|{}|this text, {},|the idea of {}|the phrase {}',
    "ask": (
        "<modal> you <kindly> <make> {} <how> <for>|<modal> you <kindly> <make> <object> {} <how> <for>"
        "|<modal> you <kindly> <hand> <whom> {} <how>|<modal> you <kindly> <hand> <whom> <object> {} <how>"
        "|<modal> you <kindly> <make> <thing> <relative> {}|<may> <have> {} <how>|<may> <have> <object> {} <how>"
        "|<may> <have> <thing> <relative> {}|what does {} look like|what would {} look like|how would you <make> {}"
        "|how does {} look|do you know how to <make> {}|do you mind <making> {} <for>"
        "|would you mind <making> <object> {}|is it possible to <make> {}|is there <object> {}"
        "|do you have <object> {}|how about {}|how about <object> {}|what about <making> {}|why not <make> {}"
        "|are you able to <make> {} <for>|where is <object> {}|have you got {}|who can <make> {}|shall we <make> {}"
        "|any chance of <object> {}|are there any <pictures> of {}"
    ),
    "wish": (
        "<want> {} <how>|<want> <object> {} <how>|<want> to <have> {} <how>|<want> to <have> <object> {} <how>"
        "|<want> you to <make> {} <how>|<want> <thing> <relative> {}|<want> to <have> <thing> <relative> {}"
        "|<want> <object> {} <for>|<want> to look at {} <how>|<want> someone to <make> {} <for>"
    ),
    "other": (
        "there should be {} in the <image>.|there must be {} on it.|{} should be in the <image>."
        "|the <image> shows {}.|the <image> should show {}.|it should be {}.|{} is what <who> needs."
        "|{} is what I want.|what I need is {}.|what I want to see is {}, <closer>.|the subject is {}.|subject: {}"
        "|topic: {}|<thing>: {}|<make>: {}|title: {}|the next <image> is {}.|think of {} and <make> it."
        "|imagine {}, then <make> it.|picture {} in your head and <make> that.|here is the description: {}"
        "|this is <object> {}.|{}, can you <make> it?|{}: <make> it <how>.|you know {}? <make> it."
        "|{}, <polite> <make> that <how>.|do you know {}? <hand> me <thing> of it.|I am thinking of {}."
        "|your task is to <make> {}.|your task: {}|task: <make> {}|<making> {} <how>|we are looking for {}."
        "|time for <making> {}.|it is time to <make> {}.|nothing but {}, <closer>.|{} and nothing else."
        "|<want> it to show {}.|the best <image> would be one of {}.|if you can, <make> {}."
        "|when you are ready, <make> <object> {}.|once again, <make> {}.|the answer is {}, so <make> it."
    ),
    "fragment": (
        "<object> {}|<object> {}.|<object> {} <how>|<object> {}, please|<thing> <relative> {}"
        "|<thing> <relative> {}, <closer>|<thing> of {} <for>|<object> {} <for>|<adjective> {}|<image> of {}"
        "|<image>, {}|{} <image>|{} <image>, please|{} as <thing>|{} on <thing>|{} in <thing>"
        "|<adjective> <image>, {}, <adjective>|{}, <adjective>, <adjective>"
    ),
    "framed": (
        "<context>. <order>.|<context>. <wish>.|<context>. <ask>?|<context>, so <order>.|<context> and <wish>."
        "|<order>. <context>.|<ask>? <context>.|<wish>. <context>.|<wish> because <context>."
        "|<order> because <context>.|<when>, <order>.|<when>, <wish>.|<when> <who> asked for {}."
        "|<who> asked for {} <when>.|<who> asked you to <make> {}.|<who> <said>: <make> {}"
        "|<who> <said> that {} would be <adjective>.|<who> <said> I should ask for {}."
        "|<who> has never seen {}, so <make> it.|<who> would be <feeling> to <have> {}.|<hello>, <order>."
        "|<hello>! <wish>.|<hello>, <ask>?|<context>. {}.|{}. <context>.|for <purpose>, <make> {}."
        "|for <purpose>, <wish>.|<order> for <purpose>.|<wish> for <purpose>.|<context> but <who> forgot {}."
        "|the <noun> about {} needs <thing>.|<word> <word>, {}, <word>|<word> {} <word>|<word> <word> <word> {}"
        "|{} <word> <word> <word>|you are <role>, <make> {}.|as <role>, <make> {} <how>."
        "|pretend to be <role> and <make> {}.|<who> is <verb> about {}, <make> it.|add {} to the <noun>."
        "|<who> <verb> a <noun> with {} on it, <make> it.|<who> likes {}, <make> one <for>."
    ),
    # Parts of requests.
    "polite": (
        "||||||please|please|kindly|just|now|then|quickly|ok,|well,|hey,|simply|next,|first,|also|again,|so,|alright,"
    ),
    "kindly": "||||please|kindly|quickly|maybe|possibly|perhaps|just|try to|also|help me|help us|now",
    "closer": (
        "|||||||please|, please|, thanks|, thank you|, would you|if you can|if possible|if you like|now|today"
        "|right away|as soon as you can|when you have time|, will you|and nothing else|, ok|, my friend"
        "|one more time|again|at once"
    ),
    "how": (
        "||||||||||quickly|carefully|slowly|in color|in detail|with care|in a simple style|as an emoji"
        "|in emoji style|as an icon|on white|on a white background|on a plain background|in small size|in the middle"
        "|very nicely|as well as you can|in bright colors|as a small picture|as a cartoon|in your own way|once more"
        "|from memory|by yourself|like an artist"
    ),
    "for": (
        "||||||||for me|for me|for us|for <who>|for <purpose>|to show <who>|to help <who>|for today|for fun|for free"
        "|for her|for him|for them|for everyone|for all of us"
    ),
    "make": (
        "draw|draw|draw|paint|sketch|create|create|make|make|show|show|render|produce|generate|generate|illustrate"
        "|design|depict|display|visualize|imagine|craft|compose|prepare|do|doodle|scribble|come up with|put together"
        "|present|output|print|picture|portray|sketch out|draw up|make up|build|form|model|invent|represent|outline"
        "|color|photograph|return|provide|deliver|construct|develop|draft|share|find|get|bring up|pull up|reveal"
        "|capture|express"
    ),
    "making": (
        "drawing|painting|sketching|creating|making|showing|rendering|producing|generating|illustrating|designing"
        "|depicting|displaying|imagining|sharing|presenting|printing|finding|sending|doing"
    ),
    "hand": (
        "show|show|show|give|give|send|bring|get|hand|draw|paint|make|find|offer|pass|sketch|create for|design for"
        "|print|do|produce for|generate for|buy|serve|provide for|lend|render for"
    ),
    "whom": "me|me|me|me|me|me|us|us|<who>|everyone|them|her|him|the others|people|someone",
    "modal": "can|can|could|could|would|will|might|can't|could|won't|so can|now can|and could|hey, can|please, could",
    "may": (
        "may I|can I|could I|can we|could we|may we|might I|should I|will I|am I going to|can <who>|could <who>"
        "|when can we|where can I"
    ),
    "have": "have|see|get|see|view|have|look at|watch|own|receive|take|enjoy|find|keep|use|check|admire|study",
    "want": (
        "I want|I'd like|I would like|I would love|I need|I'd love|we want|we need|we would like|we'd like"
        "|I am hoping|I wish|my wish is|you need|they want|she wants|he wants|<who> wants|<who> needs"
        "|<who> would like|<who> would love|<who> is hoping|I really want|I really need|I just want|all I want is"
        "|I always wanted|I only need|I expect|I hope|I plan|I prefer|everyone wants|everybody needs|today I want"
        "|now I want|I also want|I still need|maybe I want|I think I want"
    ),
    "article": "a|a|a|a|the|one|some|another|your best|my|your|any|this|that|his|our",
    "thing": (
        "<article> <image>|<article> <image>|<article> <image>|<article> <adjective> <image>|an image|an image"
        "|an emoji|an icon|an illustration|something|anything"
    ),
    "image": (
        "image|image|picture|picture|picture|drawing|emoji|icon|photo|sketch|painting|illustration|graphic|cartoon"
        "|symbol|pic|sticker|doodle|figure|portrait|design|sign|view|visual|print|scene|logo|artwork|sample|example"
        "|version|piece of art|card"
    ),
    "pictures": (
        "images|pictures|drawings|emojis|icons|photos|sketches|paintings|illustrations|symbols|cartoons|pics|stickers"
    ),
    "object": (
        "<thing> of|<thing> of|<thing> of|<thing> of|<thing> showing|<thing> with|<thing> for|<thing> depicting"
        "|<thing> featuring|<thing> containing|<thing> representing|<thing> like|<thing> about|the look of"
        "|the shape of|<thing> based on|<pictures> of"
    ),
    "relative": (
        "that shows|that has|where there is|in which there is|where we see|which shows|where you can see"
        "|that looks like|that contains|that represents|where I can see|of|with just|with only|called|named"
        "|that means|on which we see|where we find|that stands for"
    ),
    # Filler: context that says nothing about the subject.
    "context": (
        "<who> <verb> the <noun> <when>|<who> <verb> a <adjective> <noun>|the <noun> was <adjective>"
        "|it is <adjective> <when>|I am <feeling> <when>|<who> is <feeling>|we <verb> <when>|this is for <purpose>"
        "|<who> <said> it would be <adjective>|my <noun> is <adjective>|they <verb> some <noun> <where>"
        "|it was a <adjective> <noun>|I <verb> it <where>|<who> will <word> it <when>|there was no <noun> <where>"
        "|you did a <adjective> <noun>|I do not know the <noun>|<who> and <who> <verb> it|we never <verb> the <noun>"
        "|nobody <verb> <where>|it does not have to be <adjective>|I have one <noun>|the <noun> is <where>"
        "|you can use any <noun>|it must be <adjective> and <adjective>|<who> likes it <adjective>"
    ),
    "hello": (
        "hi|hello|hey|hi there|good morning|good evening|dear model|ok|listen|excuse me|sorry|hello again|thanks"
        "|great|well|all right|attention|good day|dear friend|yes|no|sure|right|look"
    ),
    "who": (
        "my sister|my brother|my friend|my mother|my father|my boss|my cousin|my neighbour|my daughter|my son"
        "|the class|the kids|the team|our group|her aunt|his uncle|someone|everyone|the customer|the reader"
        "|a stranger|the whole town|Anna|Tom|Maria|Ben|my wife|my husband|the client|a visitor|the author|our guest"
        "|the children|the editor|my family|nobody|the players|a colleague"
    ),
    "role": (
        "a painter|a designer|a famous painter|a helpful assistant|a drawing machine|an illustrator|a clever model"
        "|a kind helper|an expert|a master of drawing|a cartoon maker|the best in the world|a patient friend"
    ),
    "said": "said|told me|thinks|says|believes|wrote|explained|decided|promised|mentioned|insisted|replied|agreed",
    "feeling": (
        "happy|sad|glad|tired|bored|curious|ready|sure|busy|excited|proud|angry|afraid|hungry|late|lonely|pleased"
        "|nervous|thankful|calm"
    ),
    "verb": (
        "saw|found|made|lost|bought|sold|wanted|loved|liked|missed|knew|heard|told|broke|changed|started|finished"
        "|opened|closed|moved|played|talking|thinking|reading|asking|followed|carried|kept|needed|left|forgot"
        "|remembered|painted|washed|noticed|used|shared|tried|helped|visited|called|brought|gave|took|learned|wrote"
        "|read|cooked|built|hid|showed|watched|dreamed|worried|planned|counted|described"
    ),
    "adjective": (
        "nice|good|great|big|small|little|simple|clear|bright|beautiful|pretty|lovely|tiny|huge|colorful|funny"
        "|strange|old|young|quick|slow|easy|hard|clean|plain|fine|perfect|quiet|loud|warm|cold|dark|light|soft|sharp"
        "|round|flat|long|short|tall|wide|deep|empty|full|rich|poor|cheap|real|true|wrong|right|different|similar"
        "|special|normal|common|rare|famous|useful|serious|modern|detailed|realistic|high quality|cute|interesting"
        "|careful|gentle|friendly|wonderful|important|possible|ready|single|whole|second|last|first|next|dry|wet"
        "|heavy"
    ),
    "noun": (
        "thing|day|year|way|place|part|problem|answer|idea|story|word|page|line|list|group|team|game|lesson|plan"
        "|project|paper|poster|website|message|letter home|report|meeting|party|trip|street|garden|room|kitchen"
        "|table|floor|wall|corner|side|shop|market|town|city|village|country|world|river|hill|field|road|weather"
        "|summer|winter|morning|night|minute|hour|week|month|holiday|job|work|business|price|money|song|book cover"
        "|film|show|test|exam|class|course|lunch|dinner|meal|drink|cake shop|color|shape|size|number|name|voice"
        "|noise|silence|dream|wish|hope|mistake|reason|result|change|choice|chance|help|care|life|death|war|peace"
        "|law|rule|history|science|music|art|nature|language|culture|friendship|trouble|surprise|memory|magazine"
        "|screen|folder|program|sentence|family tree"
    ),
    "when": (
        "today|tonight|yesterday|tomorrow|this morning|this evening|last night|last week|last year|next week|at noon"
        "|on Monday|on Friday|in summer|in winter|after lunch|before dinner|right now|every day|all day|sometimes"
        "|for once|these days|at last|in the end|long ago|at the weekend"
    ),
    "where": (
        "at home|at work|at the market|in the garden|in the kitchen|in town|outside|inside|here|there|everywhere"
        "|on the road|by the river|near the station|in my room|on the table|under the floor|behind the wall|abroad"
        "|in the village|upstairs|next door|on the internet"
    ),
    "purpose": (
        "my project|a lesson|a poster|a game|my website|a story|a report|the party|a talk|our class|a birthday card"
        "|my homework|a message|the newspaper|a test|the meeting|a friend|a children's page|my collection|a slide"
        "|the menu|an exam|a contest|an app|the wall"
    ),
    "word": (
        "<noun>|<noun>|<adjective>|<adjective>|<verb>|always|never|often|maybe|because|without|between|against"
        "|during|around|really|almost|enough|together|apart|still|already|soon enough|too|very|much|many|more|less"
        "|least|most|some|any|each|both|other|same|such|than|but|while|since|until|though|whether|either|about|above"
        "|below|across|along|behind|beyond|into|through|toward|under|upon|within|near|far|go|come|run|walk|sit|stand"
        "|eat|sleep|speak|say|tell|ask|buy|sell|pay|win|lose|wait|stay|leave|live|die|grow|cut|push|pull|throw|catch"
        "|hold|carry|drive|ride|swim|climb|fall|rise|turn|stop|begin|open|close|send|receive|teach|learn|understand"
        "|believe|want|wish|hope|need|love|hate|like|fear|laugh|sing|dance around|paint|sketch|draw|show|see|look"
        "|hear|listen|feel|touch|taste|smell|think|know|remember|forget|decide|choose|try|help|follow|lead|join|meet"
        "|visit|invite|agree|refuse|let's|have|has|had|I|you|he|she|it|we|they|me|us|them|who|what|where|when|why"
        "|how|for|with|in it|of|at|by|from"
    ),
    # The other tasks.
    "ask_name": (
        "What is this?|What is this?|What's this?|what is it|What do you see?|What is in the <image>?"
        "|What is shown here?|Name this.|Name this <image>.|What emoji is this?|Which emoji is this?"
        "|Tell me what this is.|What does it show?|Identify this.|What is the name of this emoji?"
        "|What do we see here?|Say what this is.|Please name this.|Can you name it?|Describe it with a name."
        "|What am I looking at?|Do you know what this is?|name?|its name|Give the name."
        "|Could you tell me what this is?|What's in the picture?"
    ),
    "ask_category": (
        "Which category is this?|What category is this?|category?|Which category does it belong to?"
        "|What kind of emoji is this?|Name the category.|Give the category.|Tell me the category."
        "|What is its category?|Which group is it in?|Sort this into a category."
    ),
    "ask_yes_no": (
        "Is this {}?|Is this {}?|Is it {}?|Does this show {}?|Do you see {}?|Can you see {}?|{}, yes or no?"
        "|Is that {}?|{}?|Does the <image> show {}?|Is {} shown here?|Would you call this {}?|This is {}, right?"
    ),
    "ask_edit": (
        "make the skin tone {}|make the skin tone {}|change the skin tone to {}|change the skin tone to {}"
        "|set the skin tone to {}|give it a {} skin tone|give it {} skin|make the skin {}|{} skin tone, please"
        "|the same with {} skin tone|now with {} skin|turn the skin {}|use a {} skin tone"
        "|draw this with {} skin tone|can you make the skin tone {}?|I want it with {} skin"
        "|redraw it with a {} skin tone|could you change the skin to {}?|show it with {} skin|switch to {} skin tone"
        "|skin tone: {}"
    ),
    "ask_untone": (
        "remove the skin tone|remove the skin tone|make it yellow again|make the skin yellow"
        "|use the default skin tone|no skin tone, please|drop the skin tone|back to yellow|change it back to yellow"
        "|show it without skin tone|take the skin tone away"
    ),
    "ask_forward": (
        "Predict the next image.|predict the next image|What comes next?|What is next?|Draw the next one."
        "|Continue the sequence.|Continue.|Show the next frame.|Generate the next image.|Which image follows?"
        "|Guess the next picture.|And then?|next?"
    ),
    "ask_backward": (
        "This runs backwards. What comes next?|Going backwards, predict the next image.|Continue backwards."
        "|The order is reversed. Draw the next one.|In reverse: show the next frame.|backwards, what is next?"
        "|Time runs back. Continue.|Continue this reversed sequence.|What came before these?"
    ),
    "ask_thinking": (
        "Look closer at the centre, then say what it is.|Look closer at the centre, then name it."
        "|Zoom in, then say what it is.|Zoom in on the middle and name it."
        "|First look at the centre, then tell me what this is.|Take a closer look, then name this."
        "|Show the centre and say what it is.|Look at the middle closely. What is this?"
        "|Think with a closer look: what is it?|Enlarge the centre, then name it."
        "|Crop the middle, then say what this is."
    ),
    "toned": "{} with <tone> skin tone|{} with <tone> skin tone|{} with a <tone> skin tone|{} with <tone> skin",
}
ALTERNATIVES = {symbol: alternatives.split("|") for symbol, alternatives in GRAMMAR.items()}
SYMBOL = re.compile(r"<(\w+)>")

# Spelling does not tell the sound: "a unicorn", "an 8ball".
CONSONANT_SOUNDS = ("uni", "ufo", "uk", "uga", "uru", "u.s", "us ", "u7", "u5", "u6", "eu", "ewe", "one", "once")
VOWEL_SOUNDS = ("a", "e", "i", "o", "u", "é", "å", "hour", "8", "x-ray", "x ray", "sos", "ng", "rv", "mrs")


def expand(symbol: str, rng: random.Random) -> str:
    """A random sentence of `GRAMMAR[symbol]`; `<tone>` is left to the caller."""
    text = rng.choice(ALTERNATIVES[symbol])
    return SYMBOL.sub(lambda match: match[0] if match[1] == "tone" else expand(match[1], rng), text)


def normalize(text: str) -> str:
    """Lower-case words only, so that wordings compare whatever their punctuation; `{}` stays."""
    return " ".join(re.sub(r"[^\w{} ]", "", text.lower()).split())


HELD_OUT_SKELETONS = tuple(normalize(phrasing) for phrasing in HELD_OUT_PHRASINGS)


def is_held_out(phrasing: str) -> bool:
    """Whether a held-out phrasing stands in `phrasing`, an article before its subject included."""
    words = re.sub(r"\b(?:a|an|the|some) {}", "{}", normalize(phrasing))
    return any(f" {skeleton} " in f" {words} " for skeleton in HELD_OUT_SKELETONS)


def drawing_request(rng: random.Random) -> str:
    """A training wording of "draw {}", often the default one, never a held-out one."""
    if rng.random() < 0.15:
        return DEFAULT_PHRASING
    while True:
        text = re.sub(r"\s+([,.?!:])", r"\1", " ".join(expand("prompt", rng).split()))
        noisy = restyle(disturb(text, rng), rng)
        if not is_held_out(text) and not is_held_out(noisy):
            return noisy


def disturb(text: str, rng: random.Random) -> str:
    """Sometimes drops a word or adds a random one, so that the subject is found in any surroundings."""
    words = text.split()
    kind = rng.random()
    if kind < 0.06:
        removable = [i for i, word in enumerate(words) if "{}" not in word]
        if removable:
            del words[rng.choice(removable)]
    elif kind < 0.12:
        # Before or after the sentence, where a stray word cannot pass for a part of the subject.
        words.insert(rng.choice((0, len(words))), expand("word", rng))
    return " ".join(words)


def restyle(text: str, rng: random.Random) -> str:
    """Random capitals and final punctuation."""
    kind = rng.random()
    if kind < 0.6:
        text = re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text)
    elif kind < 0.63:
        text = text.upper()
    elif kind < 0.8:
        text = text.lower()
    kind = rng.random()
    if kind < 0.12:
        text = text.rstrip(".?!")
    elif kind < 0.17 and text[-1] == ".":
        text = text[:-1] + "!"
    return text


def with_article(noun: str, rng: random.Random) -> str:
    """`noun` behind a/an, the or some."""
    if noun.endswith("s") and not noun.endswith("ss"):
        return f"{rng.choice(('some', 'the'))} {noun}"
    vowel = noun.startswith(VOWEL_SOUNDS) and not noun.startswith(CONSONANT_SOUNDS)
    return f"{rng.choice(('an' if vowel else 'a',) * 3 + ('the',))} {noun}"


def conversation(task: str, pictures: Sequence[int], question: str, answer: Sequence[int | str]) -> dict:
    """A training record: pictures and a question, answered by pictures (ids) and texts."""
    reply = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in answer]
    return {
        "messages": [user_turn(pictures, question), {"role": "assistant", "content": reply}],
        "images": [*pictures, *(part for part in answer if not isinstance(part, str))],
        "task": task,
    }


def evaluation_record(task: str, pictures: Sequence[int], question: str, answer: int | str) -> dict:
    """An evaluation record: the user's turn, and the right answer as a text or a picture id."""
    return {"messages": [user_turn(pictures, question)], "images": [*pictures], "answer": answer, "task": task}


def user_turn(pictures: Sequence[int], question: str) -> dict:
    content = [{"type": "image"} for _ in pictures]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


class EmojiTasks:
    """Training and evaluation records over the rows of `emoji.parquet`.

    Args:
        rows (`Sequence[Mapping]`): The parquet's rows in their order; the `image` column is not read.

    Attributes:
        held_out_drawings (`frozenset[str]`): Base code points never looked at as drawn by Twitter.
        held_out_pairs (`frozenset[tuple[str, str]]`): (base, skin tone) pairs that no training record holds.
        held_out_starts (`dict[str, frozenset[int]]`): Per cycle of `CYCLES`, where no forward sequence begins.
        google (`list[int]`): The base emoji as drawn by Google, which text_to_image draws.
        google_looks (`frozenset[int]`): Them and their skin-tone variants.
        twitter_looks (`list[int]`): The base emoji as drawn by Twitter that training may look at.
        emphasis (`list[float]`): How often each of `google` is taken, relative to the others; 1 unless it is changed.
    """

    def __init__(self, rows: Sequence[Mapping]):
        self.rows = rows
        self.index = {(row["vendor"], row["base"], row["skin_tone"]): i for i, row in enumerate(rows)}
        self.google = [i for i, row in enumerate(rows) if row["vendor"] == "google" and not row["skin_tone"]]
        self.google_looks = frozenset(i for i, row in enumerate(rows) if row["vendor"] == "google")
        self.emphasis = [1.0] * len(self.google)

        rng = random.Random(0)
        bases = sorted(rows[i]["base"] for i in self.google)
        pairs = sorted((base, tone) for vendor, base, tone in self.index if vendor == "google" and tone in TONES)
        self.held_out_drawings = frozenset(rng.sample(bases, HELD_OUT_DRAWINGS))
        self.held_out_pairs = frozenset(rng.sample(pairs, HELD_OUT_PAIRS))
        self.held_out_starts = {
            cycle: frozenset(rng.sample(range(len(CYCLES[cycle])), count)) for cycle, count in HELD_OUT_STARTS.items()
        }

        self.google_variants: list[int] = []
        self.twitter_looks: list[int] = []
        self.twitter_variant_looks: list[int] = []
        tones_of = defaultdict(list)
        for i, row in enumerate(rows):
            vendor, base, tone = row["vendor"], row["base"], row["skin_tone"]
            if (base, tone) in self.held_out_pairs:
                continue
            if tone in ("", *TONES):
                tones_of[vendor, base].append(tone)
            if vendor == "google" and tone:
                self.google_variants.append(i)
            elif vendor == "twitter" and base not in self.held_out_drawings:
                (self.twitter_variant_looks if tone else self.twitter_looks).append(i)
        self.editable = [(vendor, base, tones) for (vendor, base), tones in tones_of.items() if len(tones) > 1]

        self.in_category = defaultdict(list)
        for i in self.google:
            self.in_category[rows[i]["category"]].append(rows[i]["name"])
        names = [rows[i]["name"] for i in self.google]
        uses = Counter(names) + Counter(alias for i in self.google for alias in rows[i]["aliases"])
        self.clear_aliases = {
            i: [alias for alias in rows[i]["aliases"] if uses[alias] == 1] for i in self.google if rows[i]["aliases"]
        }
        self.names = names
        self._samplers = {
            "text_to_image": self._text_to_image,
            "name": self._name,
            "category": self._category,
            "yes_no": self._yes_no,
            "edit": self._edit,
            "sequence": self._sequence,
            "thinking": self._thinking,
        }

    def sample(self, task: str, rng: random.Random) -> dict:
        """A training record.

        Args:
            task (`str`): One of the keys of `MIXTURE`.
            rng (`random.Random`): Where all choices come from.

        Returns:
            `dict`: `messages` (user and assistant turn), `images` (picture ids in order) and `task`.
        """
        if task not in self._samplers:
            raise ValueError(f"task is {task!r}, but must be one of {', '.join(self._samplers)}.")
        return self._samplers[task](rng)

    def evaluation(self, kind: str) -> list[dict]:
        """The records of one of `EVALUATIONS`: `messages` (user turn only), `images`, `answer` and `task`.

        An answer is a text, or a picture id where the answer is a picture.
        """
        if kind not in EVALUATIONS:
            raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(EVALUATIONS)}.")
        rng = random.Random(1)
        rows, drawings = self.rows, sorted(self.held_out_drawings)
        match kind:
            case "seen_phrasings":
                requests = [drawing_request(rng).replace("{}", name) for name in self.names]
                return [
                    evaluation_record("text_to_image", [], *pair) for pair in zip(requests, self.google, strict=True)
                ]
            case "unseen_phrasings":
                requests = [HELD_OUT_PHRASINGS[n % 3].replace("{}", name) for n, name in enumerate(self.names)]
                return [
                    evaluation_record("text_to_image", [], *pair) for pair in zip(requests, self.google, strict=True)
                ]
            case "name_google":
                return [evaluation_record("name", [i], "What is this?", rows[i]["name"]) for i in self.google]
            case "name_twitter_held_out":
                pictures = [self.index["twitter", base, ""] for base in drawings]
                return [evaluation_record("name", [i], "What is this?", rows[i]["name"]) for i in pictures]
            case "category_twitter_held_out":
                pictures = [self.index["twitter", base, ""] for base in drawings]
                question = "Which category is this?"
                return [evaluation_record("category", [i], question, rows[i]["category"].lower()) for i in pictures]
            case "edit_held_out":
                return [
                    evaluation_record(
                        "edit",
                        [self.index["google", base, ""]],
                        expand("ask_edit", rng).replace("{}", tone),
                        self.index["google", base, tone],
                    )
                    for base, tone in sorted(self.held_out_pairs)
                ]
            case "sequence_held_out":
                frames = [
                    self._frames("google", cycle, start, 1, shown + 1)
                    for cycle, starts in self.held_out_starts.items()
                    for start in sorted(starts)
                    for shown in (2, 3, 4)
                ]
                return [
                    evaluation_record("sequence", shown, "Predict the next image.", last) for *shown, last in frames
                ]

    def _look(self, rng: random.Random) -> int:
        """A picture that an understanding task may show."""
        groups = (self.google, self.google_variants, self.twitter_looks, self.twitter_variant_looks)
        group = rng.choices(groups, weights=(0.42, 0.1, 0.42, 0.06))[0]
        return rng.choices(group, self.emphasis if group is self.google else None)[0]

    def _text_to_image(self, rng: random.Random) -> dict:
        base = rng.random() < 0.85
        target = rng.choices(self.google, self.emphasis)[0] if base else rng.choice(self.google_variants)
        row = self.rows[target]
        picture = self.index["google", row["base"], ""]
        aliases = self.clear_aliases.get(picture)
        subject = rng.choice(aliases) if aliases and rng.random() < 0.25 else row["name"]
        if not base:
            subject = expand("toned", rng).replace("{}", subject).replace("<tone>", row["skin_tone"])
        request = drawing_request(rng)
        if rng.random() < 0.35:
            subject = with_article(subject, rng)
        kind = rng.random()
        if request.isupper() or kind < 0.01:
            subject = subject.upper()
        elif kind < 0.05:
            subject = subject.title()
        elif request.startswith("{}") and kind < 0.5:
            subject = subject[0].upper() + subject[1:]
        return conversation("text_to_image", [], request.replace("{}", subject), [target])

    def _name(self, rng: random.Random) -> dict:
        picture = self._look(rng)
        return conversation("name", [picture], expand("ask_name", rng), [self.rows[picture]["name"]])

    def _category(self, rng: random.Random) -> dict:
        picture = self._look(rng)
        category = self.rows[picture]["category"].lower()
        return conversation("category", [picture], expand("ask_category", rng), [category])

    def _yes_no(self, rng: random.Random) -> dict:
        picture = self._look(rng)
        row = self.rows[picture]
        name, answer = row["name"], "yes"
        if rng.random() < 0.5:
            candidates = self.in_category[row["category"]] if rng.random() < 0.5 else self.names
            name, answer = rng.choice([other for other in candidates if other != name]), "no"
        subject = with_article(name, rng) if rng.random() < 0.6 else name
        return conversation("yes_no", [picture], expand("ask_yes_no", rng).replace("{}", subject), [answer])

    def _edit(self, rng: random.Random) -> dict:
        vendor, base, tones = rng.choice(self.editable)
        source, target = rng.sample(tones, 2)
        request = expand("ask_edit", rng).replace("{}", target) if target else expand("ask_untone", rng)
        return conversation("edit", [self.index[vendor, base, source]], request, [self.index[vendor, base, target]])

    def _frames(self, vendor: str, cycle: str, start: int, step: int, count: int) -> list[int]:
        order = CYCLES[cycle]
        return [self.index[vendor, order[(start + step * n) % len(order)], ""] for n in range(count)]

    def _sequence(self, rng: random.Random) -> dict:
        vendor, cycle = rng.choice(("google", "twitter")), rng.choice(tuple(CYCLES))
        forward = rng.random() < 0.75
        barred = self.held_out_starts[cycle] if forward else ()
        start = rng.choice([n for n in range(len(CYCLES[cycle])) if n not in barred])
        *shown, last = self._frames(vendor, cycle, start, 1 if forward else -1, rng.randint(2, 4) + 1)
        return conversation("sequence", shown, expand("ask_forward" if forward else "ask_backward", rng), [last])

    def _thinking(self, rng: random.Random) -> dict:
        picture = self._look(rng)
        answer = [len(self.rows) + picture, self.rows[picture]["name"]]
        return conversation("thinking", [picture], expand("ask_thinking", rng), answer)


def corpus(tasks: EmojiTasks) -> Iterator[str]:
    """Texts to train a tokenizer on: names, aliases, categories, tones, and the texts of sampled conversations."""
    for i in tasks.google:
        yield tasks.rows[i]["name"]
        yield from tasks.rows[i]["aliases"]
    for category in tasks.in_category:
        yield category.lower()
    yield from TONES
    rng = random.Random(0)
    for task in rng.choices(list(MIXTURE), weights=MIXTURE.values(), k=CORPUS_CONVERSATIONS):
        for message in tasks.sample(task, rng)["messages"]:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")
