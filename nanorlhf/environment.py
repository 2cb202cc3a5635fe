"""The built-in environment: requests for stories, authors who write them, annotators who compare.

    request  "Write a spooky story about a fox, a lantern and the harbor."
    story    " One evening a crooked fox crept to the harbor. There the fox found a lantern full of
              whispers. The fox shivered and howled with the lantern. The end."

Everything is made from a seed by the grammar below. Training sees demonstrations by authors who are
often careless, and choices by annotators who are often wrong. It never sees the true reward
(`gold`), which is a sum of named parts.
"""
import json
import math
import random
import re
import zlib
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path

from nanorlhf.support import UserError

# --- the words -----------------------------------------------------------------------------------
# story_words.json says which words fill a slot, a place in a sentence template such as {hero}. In
# some slots a word has a mood or is plain; a story should have words of the requested mood.
# NOUNS, OTHERS, PLAIN: {slot: words}; MOODS: {mood: {slot: words}}
NOUNS, OTHERS, MOODS, PLAIN = json.loads(
    Path(__file__).with_name("story_words.json").read_text(encoding="utf-8")).values()
UNWANTED = "gloomy"         # no prompt requests this mood; a careless author writes it by mistake
WANTED = [mood for mood in MOODS if mood != UNWANTED]
ASKED = dict(mood=WANTED, **NOUNS)            # {slot: words} of what a request names
MOOD_OF = {word: mood for mood in MOODS for words in MOODS[mood].values() for word in words}
WORDS = NOUNS | OTHERS | {slot: PLAIN[slot] + [word for mood in MOODS.values()
                                               for word in mood[slot]] for slot in PLAIN}

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
# Every sentence that a template can write, as a regular expression: {slot} is any word of the slot.
ANY = {slot: f"(?:{'|'.join(words)})" for slot, words in WORDS.items()}
SENTENCES = [re.compile(text.strip().replace(".", r"\.").replace("?", r"\?").format(**ANY), re.I)
             for text in OPENINGS + FINDINGS + MIDDLES + HOMECOMINGS + DIGRESSIONS + [THE_END]]


# --- requests ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Request:
    """What the prompt asks for. str(request) is the prompt."""
    mood: str
    hero: str
    thing: str
    place: str

    def __str__(self) -> str:
        """The same request always has the same wording, so two prompts are never one request."""
        return REQUESTS[zlib.crc32(repr(self).encode()) % len(REQUESTS)].format(**vars(self))

    @property
    def held_out(self) -> bool:
        """One request in ten is kept for evaluation; no stage trains on it."""
        return zlib.crc32(f"held out? {self!r}".encode()) % 10 == 0

    @classmethod
    def parse(cls, prompt: str) -> "Request":
        """The request behind a prompt. Raises UserError where the prompt is not one of ours."""
        words = re.findall(r"\w+", prompt)
        found = [[word for word in words if word in known] for known in ASKED.values()]
        if not all(found):
            raise UserError(f"the built-in reward judges requests like {REQUESTS[0].strip()!r}, "
                            f"not {prompt.strip()[:80]!r}")
        return cls(*[first for first, *_ in found])


def near_miss(prompt: str, rng: random.Random, slot: str = "") -> str:
    """The prompt of a request that differs in one word: mood, hero, thing or place, as slot says
    or at random. It is held out only if the prompt is."""
    request, slot = Request.parse(prompt), slot or rng.choice([*ASKED])
    others = [replace(request, **{slot: word}) for word in ASKED[slot]]
    others = [r for r in others if r != request and r.held_out <= request.held_out]
    return str(rng.choice(others or [request]))


def prompts(n: int, seed: int = 0, held_out: bool = False) -> list[str]:
    """n distinct prompts, for training or held out. Raises UserError where there are fewer."""
    requests = [Request(*words) for words in product(*ASKED.values())]
    requests = [request for request in requests if request.held_out == held_out]
    if n > len(requests):
        raise UserError(f"the built-in world has {len(requests):,} such prompts, not {n:,}")
    return [str(request) for request in random.Random(f"prompts {seed}").sample(requests, n)]


# --- authors -------------------------------------------------------------------------------------
def demonstrations(n: int, seed: int = 0, held_out: bool = False) -> list[dict[str, str]]:
    """n records {"prompt", "response"}, each response by an author of another skill."""
    rng = random.Random(f"authors {seed}")
    return [dict(prompt=prompt, response=write(Request.parse(prompt), rng))
            for prompt in prompts(n, seed, held_out)]


def write(request: Request, rng: random.Random, care: float | None = None) -> str:
    """One author's story. care in [0, 1] is the skill of the author; by default it is random.

    A careless author forgets the hero, misses the mood, uses plain words, repeats a sentence,
    digresses, drops a word, or stops before the end. Each mistake lowers its own part of `gold`.
    """
    care = rng.random() if care is None else care

    def slips(rate):                    # does this author make a mistake that happens at this rate?
        return rng.random() < 2 * rate * (1 - care)

    nouns = {slot: rng.choice(words) if slips(.08) else getattr(request, slot)
             for slot, words in NOUNS.items()}
    mood = rng.choice([UNWANTED, UNWANTED, UNWANTED, *WANTED]) if slips(.30) else request.mood
    vivid = .25 + .5 * care                       # how often a word has a mood and is not plain
    middles = rng.sample(MIDDLES, 1)
    if slips(.12):                                                              # a long middle
        middles += rng.choices(MIDDLES, k=rng.randint(2, 3))
    templates = rng.choice(OPENINGS), rng.choice(FINDINGS), *middles, rng.choice(HOMECOMINGS)
    sentences = [_fill(template, nouns, mood, vivid, rng) for template in templates] + [THE_END]
    for _ in range(3):
        if slips(.28):                                                          # a digression
            sentences.insert(rng.randrange(1, len(sentences)),
                             _fill(rng.choice(DIGRESSIONS), nouns, mood, vivid, rng))
    if slips(.15):                                                              # a repetition
        at = rng.randrange(1, len(sentences))
        sentences.insert(at, sentences[at - 1])
    words = "".join(sentences).split(" ")         # the first is empty: a story begins with a space
    if slips(.05):                                                              # a word missing
        del words[rng.randrange(2, len(words) - 2)]
    if slips(.25):                                                              # cut off
        words = words[:-rng.randint(3, 12)]
    return " ".join(words)


def _fill(template, nouns, mood, vivid, rng):
    """A sentence with these nouns; other words have the mood with probability `vivid`."""
    def word(match):
        slot = match[1]
        if slot in PLAIN:
            return rng.choice((MOODS[mood] if rng.random() < vivid else PLAIN)[slot])
        return nouns[slot] if slot in nouns else rng.choice(OTHERS[slot])
    sentence = re.sub(r"\{(\w+)\}", word, template)
    return sentence[:2].upper() + sentence[2:]                           # [0] is the leading space


# --- the true reward -----------------------------------------------------------------------------
def gold(prompt: str, response: str) -> float:
    """The true reward, from about -7 to 10. Training never sees it."""
    return sum(parts(prompt, response).values())


def parts(prompt: str, response: str) -> dict[str, float]:
    """What is good and bad about a story: {name: part of the true reward}. Their sum is `gold`."""
    request = Request.parse(prompt)
    words = re.findall(r"\w+", response.lower())
    sentences = [s.strip() for s in re.findall(r"[^.?]+[.?]?", response) if s.strip()]
    moods = [1 if MOOD_OF[w] == request.mood else -1 for w in {*words} if w in MOOD_OF]
    asked = {request.hero, request.thing, request.place}
    nouns = {slot: _mean([w == getattr(request, slot) for w in words if w in known])
             for slot, known in NOUNS.items()}     # hero: the share of the right one among heroes
    return dict(
        subject=2 * _mean([not asked.isdisjoint(re.findall(r"\w+", s)) for s in sentences
                           if s != THE_END.strip()]),
        **nouns,
        mood=3 * max(-1, min(1, sum(moods) / 7)),         # up to seven distinct words in the mood
        grammar=_mean([any(form.fullmatch(s) for form in SENTENCES) for s in sentences]),
        freshness=-2 * (1 - _mean([s not in sentences[:i] for i, s in enumerate(sentences)])),
        length=-min(2, max(0, len(words) - 45, 25 - len(words)) / 10),   # 25 to 45 words are right
        ending=float(response.endswith(THE_END)))


def _mean(flags):
    return sum(flags) / len(flags) if flags else 0.0


# --- annotators ----------------------------------------------------------------------------------
@dataclass
class Annotator:
    """Chooses between two responses by Bradley-Terry on the true reward, and so errs at times."""
    temperature: float = 1.0      # 0: never wrong; the higher, the more often wrong
    likes_length: float = 0.0     # bias: reward for each word
    likes_first: float = 0.0      # bias: reward for standing first
    taste: dict = field(default_factory=dict)    # {part: weight}, for weights other than 1

    def reward(self, prompt: str, response: str) -> float:
        """The reward as this annotator sees it: the true parts in other weights, and the bias."""
        weighted = sum(self.taste.get(name, 1) * x for name, x in parts(prompt, response).items())
        return weighted + self.likes_length * len(response.split())

    def prefers_first(self, margin: float) -> float:
        """margin: reward of first - second; P(first is chosen) = sigmoid(margin / temperature)"""
        margin = (margin + self.likes_first) / (self.temperature or 1e-300)      # not by 0
        return 1 / (1 + math.exp(-max(-500, min(500, margin))))      # exp() overflows beyond 709

    def compare(self, prompt: str, responses: list[str], rng: random.Random) -> list[tuple]:
        """Compare every two responses once -> list of (index of chosen, index of rejected, ceiling)

        A judge who knows p agrees this often, max(p, 1 - p): no reward model can be better.
        """
        rewards, choices = [self.reward(prompt, response) for response in responses], []
        for i, j in combinations(range(len(responses)), 2):
            p = self.prefers_first(rewards[i] - rewards[j])
            chosen, rejected = (i, j) if rng.random() < p else (j, i)
            choices.append((chosen, rejected, max(p, 1 - p)))
        return choices
