"""The built-in world: the true reward has parts, and annotators err at a known rate."""

import math
import random
import re

import pytest

from nanorlhf import environment
from nanorlhf.environment import Annotator, Request, demonstrations, gold, parts, prompts, write
from nanorlhf.support import UserError

REQUEST = Request("spooky", "fox", "lantern", "harbor")
PROMPT = str(REQUEST)
PERFECT = (
    " One evening a crooked fox crept to the harbor. There the fox found a haunted lantern full of"
    " whispers. The fox shivered and howled with the lantern. So the fox prowled home with the"
    " lantern. The end."
)
BEST = parts(PROMPT, PERFECT)


def sentences(story):
    return [x.strip() for x in re.findall(r"[^.?]+[.?]", story)]


# --- prompts ---


def test_a_seed_gives_the_same_world_again():
    for make in prompts, demonstrations:
        assert make(50, seed=3) == make(50, seed=3) != make(50, seed=4)


def test_held_out_prompts_are_never_among_training_prompts():
    train, held_out = prompts(3000, seed=1), prompts(1000, seed=2, held_out=True)
    assert len(set(train)) == 3000 and len(set(held_out)) == 1000  # and all are distinct
    assert not set(train) & set(held_out)
    assert {d["prompt"] for d in demonstrations(30, 5, held_out=True)}.isdisjoint(train)


def test_nobody_waits_for_a_prompt_that_does_not_exist():
    for held_out in False, True:
        with pytest.raises(UserError, match="the built-in world has .* prompts, not 50,000"):
            prompts(50_000, held_out=held_out)


def test_a_prompt_can_be_read_back():
    for prompt in prompts(200):
        assert str(Request.parse(prompt)) == prompt


def test_every_way_of_asking_occurs():
    beginnings = {prompt.split()[0] for prompt in prompts(100)}
    assert beginnings == {template.split()[0] for template in environment.REQUESTS}


@pytest.mark.parametrize(
    "prompt",
    ["", "\n\nHuman: Hi\n\nAssistant:", "Write a spooky story about a fox and the harbor.\n"],
)
def test_a_prompt_of_another_world_is_refused_in_a_sentence(prompt):
    with pytest.raises(UserError, match="the built-in reward judges requests like"):
        gold(prompt, PERFECT)


# --- the grammar writes what it recognises ---


def test_every_sentence_that_a_careful_author_writes_is_recognised():
    rng = random.Random(0)
    for prompt in prompts(300):
        story = write(Request.parse(prompt), rng, care=1)
        assert parts(prompt, story)["grammar"] == BEST["grammar"], story


def test_every_template_comes_up_and_is_recognised():
    rng, used = random.Random(0), set()
    for prompt in prompts(400):
        for sentence in sentences(write(Request.parse(prompt), rng, care=0.3)):
            used |= {form.pattern for form in environment.SENTENCES if form.fullmatch(sentence)}
    assert used == {form.pattern for form in environment.SENTENCES}


def test_words_that_are_not_of_this_world_are_not_recognised():
    for nonsense in "The fox the fox.", "So the fox went", "So the car went home with the kite.":
        assert not any(form.fullmatch(nonsense) for form in environment.SENTENCES)


def test_no_word_has_two_moods_or_is_both_plain_and_moody():
    words = [w for slots in environment.MOODS.values() for group in slots.values() for w in group]
    plain = [w for group in environment.PLAIN.values() for w in group]
    nouns = [*sum(environment.NOUNS.values(), []), *environment.OTHERS["spot"]]
    assert len(set(words + plain + nouns)) == len(words + plain + nouns)


# --- the truth ---


def test_nobody_beats_the_perfect_story():
    rng = random.Random(0)
    for care in [1.0] * 500 + [0.5] * 500:
        written = parts(PROMPT, write(REQUEST, rng, care))
        assert written.keys() == BEST.keys()
        assert all(written[name] <= BEST[name] + 1e-9 for name in BEST)


def test_gold_is_the_sum_of_its_parts():
    assert gold(PROMPT, PERFECT) == sum(BEST.values())


def test_what_was_asked_for_is_the_largest_part_of_the_true_reward():
    asked = [BEST[name] for name in ("mood", "hero", "thing", "place")]
    assert sum(asked) > 0.5 * sum(BEST.values())
    assert BEST["mood"] == max(BEST.values()) and min(asked) > 0.5


REPEAT = " The fox shivered and howled with the lantern."
RAMBLE = " The fox walked slowly and turned around the harbor." * 6
FLAWS = {
    "subject": lambda s: s.replace(" The end", " Have you ever tried soup with sugar? The end"),
    "hero": lambda s: s.replace("The fox", "The wolf"),
    "thing": lambda s: s.replace("with the lantern", "with the kettle"),
    "place": lambda s: s.replace("harbor", "barn"),
    "mood": lambda s: s.replace("crooked", "sunny").replace("crept", "skipped"),
    "grammar": lambda s: s.replace("fox crept to the", "fox to the"),
    "freshness": lambda s: s.replace(REPEAT, REPEAT * 2),
    "length": lambda s: s.replace(" So the fox", RAMBLE + " So the fox"),
    "ending": lambda s: s.removesuffix(" The end."),
}


@pytest.mark.parametrize("part", FLAWS)
def test_a_flaw_costs_its_own_part(part):
    story = FLAWS[part](PERFECT)
    assert story != PERFECT
    assert parts(PROMPT, story)[part] < BEST[part] and gold(PROMPT, story) < gold(PROMPT, PERFECT)


def test_every_part_has_its_flaw():
    assert FLAWS.keys() == BEST.keys()


@pytest.mark.parametrize("part", ["hero", "thing", "place", "mood", "freshness", "ending"])
def test_most_flaws_leave_the_other_parts_alone(part):
    flawed = parts(PROMPT, FLAWS[part](PERFECT))
    assert {name for name in BEST if flawed[name] != BEST[name]} == {part}


def test_a_story_for_another_request_scores_less():
    for other in prompts(50):
        assert gold(other, PERFECT) < gold(PROMPT, PERFECT)


@pytest.mark.parametrize(
    "story", ["", " ", " The end." * 20, " spooky" * 40, "." * 30, "\ufffd\n\x00"]
)
def test_nonsense_has_a_score_and_a_low_one(story):
    assert gold(PROMPT, story) < gold(PROMPT, PERFECT) - 2


def test_saying_a_moody_word_twice_is_no_gain():
    once = " So the dreadful fox crept home."
    assert parts(PROMPT, once * 3)["mood"] == parts(PROMPT, once)["mood"]


# --- authors ---


def test_more_careful_authors_write_better():
    rng, means = random.Random(0), []
    for care in 0, 0.5, 1:
        means.append(sum(gold(PROMPT, write(REQUEST, rng, care)) for _ in range(200)) / 200)
    assert means[0] + 0.5 < means[1] < means[2] - 0.5


def test_demonstrations_are_good_on_average_and_never_the_best_there_could_be():
    scores = [gold(d["prompt"], d["response"]) for d in demonstrations(300)]
    mean = sum(scores) / 300
    assert gold(PROMPT, "") + 2 < mean < gold(PROMPT, PERFECT) - 1


# --- annotators ---

WORSE = PERFECT.replace("harbor", "barn")
MARGIN = gold(PROMPT, PERFECT) - gold(PROMPT, WORSE)


def choose(annotator, n, first=PERFECT, second=WORSE):
    """How often, of n comparisons, the first is chosen; and the ceiling of the first."""
    rng = random.Random(0)
    choices = [annotator.compare(PROMPT, [first, second], rng)[0] for _ in range(n)]
    return sum(chosen == 0 for chosen, _, _ in choices) / n, choices[0][2]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_error_rate_is_what_the_temperature_says(temperature):
    expected = 1 / (1 + math.exp(-MARGIN / temperature))
    share, ceiling = choose(Annotator(temperature), 2000)
    assert ceiling == pytest.approx(expected)
    assert share == pytest.approx(expected, abs=4 * (0.25 / 2000) ** 0.5)


def test_the_ceiling_is_the_same_whichever_stands_first():
    one, other = choose(Annotator(), 1), choose(Annotator(), 1, WORSE, PERFECT)
    assert one[1] == pytest.approx(other[1]) and one[1] > 0.5


def test_at_temperature_zero_nobody_errs():
    annotator = Annotator(temperature=0)
    assert choose(annotator, 20)[0] == 1 and choose(annotator, 20, WORSE, PERFECT)[0] == 0
    assert choose(annotator, 20)[1] == 1
    assert 0.2 < choose(annotator, 200, PERFECT, PERFECT)[0] < 0.8  # a tie is decided at random


def test_every_two_are_compared_once():
    choices = Annotator().compare(PROMPT, [PERFECT, WORSE, "", PERFECT], random.Random(0))
    pairs = [tuple(sorted(choice[:2])) for choice in choices]
    assert pairs == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_the_ceiling_is_how_often_the_truth_agrees_with_the_annotators():
    rng, annotator, right, ceilings = random.Random(0), Annotator(1.0), 0, []
    for d in demonstrations(400):
        texts = [d["response"], write(Request.parse(d["prompt"]), rng)]
        scores = [gold(d["prompt"], text) for text in texts]
        chosen, rejected, ceiling = annotator.compare(d["prompt"], texts, rng)[0]
        right += scores[chosen] > scores[rejected]
        ceilings.append(ceiling)
    assert 0.7 < sum(ceilings) / 400 < 0.98
    assert right / 400 == pytest.approx(sum(ceilings) / 400, abs=0.07)


def test_a_bias_for_length_or_for_the_first_changes_choices():
    longer = WORSE.replace(" The end.", " The fox waited again and went around the barn. The end.")
    assert choose(Annotator(temperature=0), 1, PERFECT, longer)[0] == 1
    assert choose(Annotator(temperature=0, likes_length=5.0), 1, PERFECT, longer)[0] == 0
    assert choose(Annotator(temperature=0, likes_first=50.0), 1, WORSE, PERFECT)[0] == 1


def test_a_taste_of_ones_own_changes_choices():
    off_place, unended = PERFECT.replace("harbor", "barn"), PERFECT.removesuffix(" The end.")
    likes_endings = Annotator(temperature=0, taste=dict(place=0, ending=10))
    likes_places = Annotator(temperature=0, taste=dict(place=100, ending=0))
    assert choose(likes_endings, 1, off_place, unended)[0] == 1
    assert choose(likes_places, 1, off_place, unended)[0] == 0


def test_a_taste_is_a_weight_of_the_parts():
    assert Annotator(taste=dict(mood=3)).reward(PROMPT, PERFECT) == pytest.approx(
        gold(PROMPT, PERFECT) + 2 * BEST["mood"]
    )


def test_a_huge_margin_does_not_overflow():
    annotator = Annotator(temperature=1e-6)
    assert annotator.prefers_first(10) == 1 and annotator.prefers_first(-10) == pytest.approx(0)
