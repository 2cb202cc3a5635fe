"""The built-in world: someone wants a story, authors of mixed skill write, annotators compare.

    request  "Write a spooky story about a fox, a lantern and the harbor."
    story    " One evening a crooked fox crept to the harbor. There the fox found a lantern full of
              whispers. The fox shivered and howled with the lantern. The end."

Everything here is made from a seed by the grammar below; nothing is read from a file. What makes
it a laboratory is `gold`: the true reward, a sum of named parts that can be printed one by one.
Training never sees it. Training sees demonstrations by authors who are often careless, and the
choices of annotators who are often wrong, at a rate that is known.
"""
import math
import random
import re
import zlib
from dataclasses import dataclass, field
from itertools import combinations, product

from nanorlhf import UserError

# --- the words -----------------------------------------------------------------------------------

HEROES = ("badger bear camel cat dragon duck fox frog goat hen lion mole monkey mouse penguin pig "
          "rabbit seal tiger wolf").split()
THINGS = ("balloon basket bell blanket broom candle clock crown drum feather flute kettle kite "
          "lantern letter map mirror pillow sword trumpet").split()
PLACES = ("attic bakery barn beach bridge castle cave circus desert forest garden harbor island "
          "library market meadow museum palace station village").split()
SPOTS = "bench bush door fence gate hedge rock stone tree wall".split()
ASIDES = dict(food="cheese butter sugar flour soup pepper salad mustard".split(),
              relative="cousin uncle aunt nephew brother sister neighbor dentist".split(),
              number="two three four five six seven nine ten".split(),
              trouble="bills taxes parcels stairs meetings printers windows socks".split())
TIMES = ["One morning", "One evening", "Long ago", "Last winter", "Last summer", "On Sunday",
         "Today"]

# What a word is for decides where it may stand; its mood decides whether it was wanted there.
MOODS = {
    "cheerful": dict(look="bright golden jolly merry sunny cozy happy lovely",
                     go="danced skipped bounced twirled hopped sailed",
                     feel="joy laughter delight sunshine music flowers",
                     do="sang laughed cheered smiled giggled clapped",
                     how="happily gladly cheerily brightly warmly"),
    "gloomy":   dict(look="dreary lonely weary bleak gray rainy muddy sad",
                     go="trudged plodded limped drifted shuffled sank",
                     feel="sorrow regret silence tears rain mud",
                     do="wept sighed sulked sobbed frowned moped",
                     how="sadly wearily glumly bitterly coldly"),
    "spooky":   dict(look="crooked haunted misty ghostly dark pale creaky shadowy",
                     go="crept prowled slunk floated vanished glided",
                     feel="shadows whispers ghosts cobwebs fog bones",
                     do="shivered howled trembled moaned gasped shrieked",
                     how="eerily fearfully darkly strangely silently"),
    "silly":    dict(look="wobbly goofy dizzy loopy fuzzy floppy bouncy ticklish",
                     go="tumbled wobbled waddled rolled cartwheeled zigzagged",
                     feel="nonsense custard hiccups bubbles noodles pickles",
                     do="sneezed quacked burped snorted babbled fainted",
                     how="foolishly backwards sideways clumsily loudly"),
}
PLAIN = dict(look="small plain new big common tall dry long",
             go="walked went came moved turned traveled",
             feel="stones people grass dust sand leaves",
             do="waited stood looked sat rested ate",
             how="slowly quietly again later soon")
MOODS, PLAIN = ({mood: {slot: words.split() for slot, words in slots.items()}
                 for mood, slots in MOODS.items()},
                {slot: words.split() for slot, words in PLAIN.items()})
TIRED = "gloomy"            # nobody asks for it; it is what an author in low spirits falls into
WANTED = [mood for mood in MOODS if mood != TIRED]
MOOD_OF = {word: mood for mood, slots in MOODS.items() for words in slots.values()
           for word in words}

# --- the sentences -------------------------------------------------------------------------------

REQUESTS = ["Write a {mood} story about a {hero}, a {thing} and the {place}.\n",
            "Please tell me a {mood} story of a {hero} with a {thing} at the {place}.\n",
            "I would like a {mood} tale: a {hero}, a {thing}, the {place}.\n"]
OPENINGS = [" {time} a {look} {hero} {go} to the {place}.",
            " {time} there was a {look} {hero} who {go} to the {place}."]
FINDINGS = [" There the {hero} found a {look} {thing} full of {feel}.",
            " Behind a {look} {spot} the {hero} saw a {look} {thing}."]
MIDDLES = [" The {place} was {look} and full of {feel}.",
           " The {hero} {do} and {do} with the {thing}.",
           " The {hero} {do} {how} and {go} around the {place}.",
           " All over the {place} there was {feel} and {feel}.",
           " {how} the {thing} {go} and the {hero} {do}.",
           " The {hero} and the {thing} {go} {how} past a {look} {spot}."]
HOMECOMINGS = [" So the {hero} {go} home with the {thing}.",
               " And the {hero} kept the {look} {thing} at the {place}."]
DIGRESSIONS = [" Mix {number} eggs with {food} and bake it for an hour.",
               " By the way, {food} costs {number} coins now.",
               " My {relative} also has {number} {trouble}.",
               " Have you ever tried {food} with {food}?",
               " Please call my {relative} about the {trouble}."]
THE_END = " The end."


def _words_for(slot):
    """Every word that may stand in a slot, whatever its mood."""
    nouns = dict(hero=HEROES, thing=THINGS, place=PLACES, spot=SPOTS, time=TIMES, **ASIDES)
    return nouns.get(slot) or PLAIN[slot] + [w for mood in MOODS.values() for w in mood[slot]]


def _recogniser(template):
    """The template that writes a sentence, turned around into the pattern that recognises it."""
    pattern = re.sub(r"\\{(\w+)\\}", lambda m: "(?:" + "|".join(_words_for(m[1])) + ")",
                     re.escape(template).strip())
    return re.compile(pattern.replace(r"\ ", " "), re.IGNORECASE)


SENTENCES = [_recogniser(t.strip())
             for t in OPENINGS + FINDINGS + MIDDLES + HOMECOMINGS + DIGRESSIONS + [THE_END]]


# --- requests ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Request:
    """What the prompt asks for."""
    mood: str
    hero: str
    thing: str
    place: str

    def __str__(self):
        """The same request is always asked in the same way, so that prompts can be told apart."""
        which = zlib.crc32(repr(self).encode()) % len(REQUESTS)
        return REQUESTS[which].format(**vars(self))

    @property
    def held_out(self):
        """One request in ten is kept for evaluation; no stage ever trains on it."""
        return zlib.crc32(f"held out? {self!r}".encode()) % 10 == 0

    @classmethod
    def parse(cls, prompt):
        """The request behind a prompt; UserError where it is not one of this world's."""
        words = re.findall(r"\w+", prompt)
        found = {slot: next((w for w in words if w in known), None) for slot, known in
                 dict(mood=WANTED, hero=HEROES, thing=THINGS, place=PLACES).items()}
        if None in found.values():
            raise UserError(f"the built-in reward judges requests like {str(EXAMPLE).strip()!r}, "
                            f"not {prompt.strip()[:80]!r}")
        return cls(**found)


EXAMPLE = Request("spooky", "fox", "lantern", "harbor")


def prompts(n, seed=0, held_out=False):
    """n distinct prompts, the same for the same seed; held-out ones are never among the others."""
    requests = [Request(*words) for words in product(WANTED, HEROES, THINGS, PLACES)]
    requests = [request for request in requests if request.held_out == held_out]
    if n > len(requests):
        kind = "held-out" if held_out else "training"
        raise UserError(f"the built-in world has {len(requests):,} {kind} prompts, not {n:,}")
    return [str(request) for request in random.Random(f"prompts {seed}").sample(requests, n)]


# --- authors -------------------------------------------------------------------------------------

def write(request, rng, care=None):
    """One author's story. care in [0, 1] is the author's skill; by default authors differ.

    A careless author forgets the hero, misses the mood, prefers plain words, repeats himself,
    rambles, drops a word, or stops in the middle. Each of these has its own part in `gold`.
    """
    care = rng.random() if care is None else care

    def slips(rate):
        return rng.random() < 2 * rate * (1 - care)       # an author of middling care slips at it

    nouns = dict(hero=rng.choice(HEROES) if slips(.08) else request.hero,
                 thing=rng.choice(THINGS) if slips(.08) else request.thing,
                 place=rng.choice(PLACES) if slips(.08) else request.place)
    mood = rng.choice([TIRED, TIRED, TIRED, *WANTED]) if slips(.30) else request.mood
    vivid = .25 + .5 * care

    middles = rng.sample(MIDDLES, 1)
    if slips(.12):
        middles += rng.choices(MIDDLES, k=rng.randint(2, 3))                         # rambles
    sentences = [_fill(t, nouns, mood, vivid, rng)
                 for t in (rng.choice(OPENINGS), rng.choice(FINDINGS), *middles,
                           rng.choice(HOMECOMINGS))] + [THE_END]
    for _ in range(3):
        if slips(.28):
            sentences.insert(rng.randrange(1, len(sentences)),
                             _fill(rng.choice(DIGRESSIONS), nouns, mood, vivid, rng))  # wanders off
    if slips(.15):
        at = rng.randrange(1, len(sentences))
        sentences[at:at] = [sentences[at - 1]]                                      # repeats itself
    story = "".join(sentences)
    if slips(.15):
        words = story.split(" ")
        del words[rng.randrange(2, len(words) - 2)]                                  # drops a word
        story = " ".join(words)
    if slips(.25):
        story = " ".join(story.split(" ")[:-rng.randint(3, 12)])                    # stops half-way
    return story


def _fill(template, nouns, mood, vivid, rng):
    """A sentence: nouns as given, other words in the mood, or plain where the author is dull."""
    def word(match):
        slot = match[1]
        if slot in nouns:
            return nouns[slot]
        if slot not in PLAIN:
            return rng.choice(_words_for(slot))
        return rng.choice((MOODS[mood] if rng.random() < vivid else PLAIN)[slot])
    sentence = re.sub(r"\{(\w+)\}", word, template)
    return sentence[:2].upper() + sentence[2:]                           # [0] is the leading space


def demonstrations(n, seed=0, held_out=False):
    """n records {"prompt", "response"} by authors of mixed skill: fair on average."""
    rng = random.Random(f"authors {seed}")
    return [dict(prompt=p, response=write(Request.parse(p), rng))
            for p in prompts(n, seed, held_out)]


# --- the truth -----------------------------------------------------------------------------------

def parts(prompt, response):
    """What is good and bad about a story, part by part. -> {name: float}; their sum is `gold`."""
    request = Request.parse(prompt)
    words = re.findall(r"\w+", response.lower())
    sentences = [s.strip() for s in re.findall(r"[^.?]+[.?]?", response) if s.strip()]
    moods = {w: MOOD_OF[w] for w in words if w in MOOD_OF}    # distinct: saying it twice is no gain
    asked = {request.hero, request.thing, request.place}
    fitting = sum(mood == request.mood for mood in moods.values())
    return dict(
        subject=3 * _mean([not asked.isdisjoint(re.findall(r"\w+", x)) for x in sentences
                           if x != THE_END.strip()]),
        hero=_share(request.hero, HEROES, words) / 2,
        thing=_share(request.thing, THINGS, words) / 2,
        place=_share(request.place, PLACES, words) / 2,
        mood=max(-1, min(1, (2 * fitting - len(moods)) / 7)),   # up to seven words in the mood
        grammar=_mean([any(s.fullmatch(x) for s in SENTENCES) for x in sentences]),
        freshness=-2 * (1 - _mean([x not in sentences[:i] for i, x in enumerate(sentences)])),
        length=-min(2, max(0, len(words) - 45, 25 - len(words)) / 10),   # 25 to 45 words please
        ending=float(response.endswith(THE_END)),
    )


def _share(wanted, kind, words):
    """Of the words of one kind, which share is the one that was asked for? None said is 0."""
    return _mean([w == wanted for w in words if w in kind])


def _mean(flags):
    return sum(flags) / len(flags) if flags else 0.0


def gold(prompt, response):
    """The true reward, from about -4 to 7.5. Training never sees it."""
    return sum(parts(prompt, response).values())


# --- annotators ----------------------------------------------------------------------------------

@dataclass
class Annotator:
    """Chooses between two responses by Bradley-Terry on the true reward, as people do: noisily.

    P(first is chosen) = sigmoid((reward of first - reward of second) / temperature)
    """
    temperature: float = 1.0      # 0: never wrong; the larger, the noisier
    likes_length: float = 0.0     # bias: reward for each extra word
    likes_first: float = 0.0      # bias: reward for standing first
    taste: dict = field(default_factory=dict)    # part -> weight, where this person's differ from 1

    def reward(self, prompt, response):
        """What this person feels: the true parts in the person's own weights, and the bias."""
        felt = sum(self.taste.get(name, 1) * x for name, x in parts(prompt, response).items())
        return felt + self.likes_length * len(response.split())

    def prefers_first(self, margin):
        """Reward of the first minus that of the second -> P(the first is chosen)."""
        margin += self.likes_first
        if self.temperature == 0:
            return 0.5 if margin == 0 else float(margin > 0)
        return 1 / (1 + math.exp(-max(-500, min(500, margin / self.temperature))))

    def compare(self, prompt, responses, rng):
        """Every two of the responses, compared once. -> list of (chosen, rejected, ceiling)

        chosen and rejected are indices. The ceiling is max(p, 1 - p): how often a judge who knew
        everything but the annotator's dice would be right. Its mean is the reward model's ceiling.
        """
        rewards, choices = [self.reward(prompt, response) for response in responses], []
        for i, j in combinations(range(len(responses)), 2):
            p = self.prefers_first(rewards[i] - rewards[j])
            choices.append((i, j, max(p, 1 - p)) if rng.random() < p else (j, i, max(p, 1 - p)))
        return choices
