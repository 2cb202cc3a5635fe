"""Talk with a model, in the terminal or on a page.

    python -m nanorlhf.people.chat out/ppo                           in the terminal
    python -m nanorlhf.people.chat out/ppo --page                    the same in a browser
    python -m nanorlhf.people.chat out/ppo --prompt "Write a ..."    one answer, for a script

A message gets the form of the prompts that the model was trained on. A model of conversations sees
all turns, without end tokens between them, as in training; a model of single prompts has never seen
a second turn, and sees the last message alone. The page is chat.html.
"""
import codecs
import os
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nanorlhf.generate import draw_uniforms, sample
from nanorlhf.logprobs import tempered
from nanorlhf.model import KVCache, load_policy
from nanorlhf.people.page import PageConfig, serve
from nanorlhf.support import UserError, fast
from nanorlhf.support.checkpoint import read_json
from nanorlhf.support.config import run, setup
from nanorlhf.support.formats import ASSISTANT, SPEAKER, dialogues, read_records
from nanorlhf.support.runlog import printable

# What stands before and after a message, and whether it goes on with what came before.
FORMS = dict(story=("", "\n", False), conversation=(SPEAKER["user"], ASSISTANT, True),
             text=("", "", True))
HELP = """/compare FOLDER  the model in that folder answers, too; without a folder: no longer
/reset           forget all turns
/help            this"""


@dataclass
class ChatConfig(PageConfig):
    """Talk with a model, in the terminal or in a browser."""
    policy: str = "out/ppo"           # the model: a run folder, or gpt2
    prompt: str = ""                  # print the answer to this and nothing else
    page: bool = False                # talk in a browser
    top_k: int = 0                    # sample from this many of the likeliest tokens; 0: from all
    top_p: float = 1.0                # and from the fewest that have this probability together
    form: Literal["auto", *FORMS] = "auto"  # of prompts; auto: that of its training data
    POSITIONAL = "policy"
    RANGES = PageConfig.RANGES | dict(temperature=(0, 10**9), top_k=(0, 10**9), top_p=(0.001, 1))


def form_of(folder: str) -> tuple[str, str, bool]:
    """As in FORMS: that of the first prompt in the data that a model was trained on."""
    path = Path(folder) / "settings.json"
    if not path.exists():
        return FORMS["text"]                         # a model from elsewhere, such as GPT-2
    if not (files := read_json(path, folder).get("data")):
        return FORMS["story"]                        # the built-in world
    try:
        where, record = next(read_records(files[0]))
        prompt, _ = dialogues(record, 0, where)[0]
    except UserError as error:
        raise UserError(f"expected --form, or the data of {folder}; came {error}") from None
    if prompt.endswith(ASSISTANT):
        return FORMS["conversation"]
    return "", prompt[len(prompt.rstrip()):], not prompt


def truncate(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """-inf for all but the top_k likeliest tokens (0: all stay), and of these for all but the
    fewest that have the probability top_p together (Holtzman et al. 2020). (B, V) -> (B, V)

    For talking alone: PPO's ratios and KL are those of tokens drawn from the whole distribution.
    """
    if temperature == 0:                             # the likeliest token stays in any case
        return logits
    values, order = logits.sort(descending=True)
    if top_k:
        values[:, top_k:] = -torch.inf
    if top_p < 1:
        p = tempered(values, temperature).softmax(-1)
        values[p.cumsum(-1) - p >= top_p] = -torch.inf
    return torch.empty_like(values).scatter_(-1, order, values)


class Talker:
    """A model that answers, and the keys and values of the tokens that it has read last."""

    def __init__(self, folder, cfg, device):
        (self.model, self.tok), self.cfg = load_policy(folder, device), cfg
        self.before, self.after, self.remembers = FORMS.get(cfg.form) or form_of(folder)
        self.bytes = {i: token for token, i in self.tok.ranks.items()}
        config, dtype = self.model.config, fast.computed_dtype(self.model)
        self.cache, self.read = KVCache(config, 1, config.n_positions, device, dtype), []

    def context(self, turns: list[tuple[str, list[int]]]) -> tuple[list[int], int]:
        """Tokens of the newest turns (message, answer) that leave room for an answer, and how many
        older ones do not fit. Raises UserError where the last message alone is too long."""
        room = self.model.config.n_positions - self.cfg.max_new_tokens
        rows, skip = [], [self.tok.eos] if self.after == ASSISTANT else []
        for message, answer in turns if self.remembers else turns[-1:]:
            if not all(token in range(self.tok.vocab_size) for token in answer):
                raise UserError("expected answers of this model, came tokens that it does not have")
            rows.append(self.tok.encode(self.before + message.rstrip() + self.after)
                        + [token for token in answer if token not in skip])
        for old in range(len(rows)):
            if len(tokens := [*chain(*rows[old:])]) <= room:
                return tokens or [self.tok.eos], old
        raise UserError(f"expected a message of at most {room} tokens, came one of {len(rows[-1])}")

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> Tensor:
        """Of the token that comes next. -> (1, V). The beginning that these tokens share with those
        read before is cached; only what follows is computed."""
        start = min(len(os.path.commonprefix([self.read, tokens])), len(tokens) - 1)
        self.read, self.cache.filled = tokens[:start], len(tokens)       # overwritten from there on
        new, at = (torch.tensor(x, device=self.model.device)[None]
                   for x in (tokens[start:], range(start, len(tokens))))
        hidden = self.model.transformer(new, self.cache, at)[:, -1]
        self.read = [*tokens]
        if not hidden.isfinite().all():
            raise UserError("the model's output is not a finite number, so it cannot answer")
        return self.model.head(hidden).cpu()

    def answer(self, turns, uniforms):
        """Yield {"token", "text"} for each token of an answer to the last turn, as it comes. Where
        a character is of several tokens, the last of them has it."""
        (tokens, old), cfg = self.context(turns), self.cfg
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if old:
            yield dict(note=f"no longer in the context: the oldest turns, {old} of them")
        for u in uniforms.split(1, dim=1):
            logits = truncate(self.logits(tokens), cfg.temperature, cfg.top_k, cfg.top_p)
            tokens.append(sample(logits, cfg.temperature, u).item())
            yield dict(token=tokens[-1], text=decoder.decode(self.bytes.get(tokens[-1], b"")))
            if tokens[-1] == self.tok.eos:
                break
        yield dict(text=decoder.decode(b"", final=True), last=True)


class Chat:
    """Models that answer, one after the other."""

    def __init__(self, cfg, device):
        self.cfg, self.device, self.talkers, self.lock = cfg, device, {}, threading.Lock()
        self.rng = torch.Generator().manual_seed(cfg.seed)

    def talker(self, name):
        if name not in self.talkers:
            self.talkers[name] = Talker(name, self.cfg, self.device)
        return self.talkers[name]

    def answers(self, models, turns):
        """Yield what Talker.answer does, for each model from the same random numbers. turns: a list
        of {"message": text, "answers": {model: tokens}}; a model knows those it has answered."""
        with self.lock:
            uniforms = draw_uniforms(1, self.cfg.max_new_tokens, rng=self.rng)
            *before, last = turns
            for name in models:
                known = [(turn["message"], turn["answers"][name]) for turn in before
                         if name in turn["answers"]]
                for event in self.talker(name).answer([*known, (last["message"], [])], uniforms):
                    yield dict(event, model=name)


def show(chat, models, turns):
    """Print the answers to the last turn as they come, and keep their tokens there."""
    answers = turns[-1]["answers"]
    for event in chat.answers(models, turns):
        if event["model"] not in answers and models[1:]:
            print(f"[{event['model']}]")
        tokens = answers.setdefault(event["model"], [])
        if "note" in event:
            print(f"({event['note']})", file=sys.stderr)
        text = printable(event.get("text", ""))
        print(text if tokens else text.lstrip(), end="\n" * ("last" in event), flush=True)
        tokens += [event["token"]] if "token" in event else []


def in_terminal(chat):
    models, turns = [chat.cfg.policy], []
    while True:
        line = input("> ").strip()
        command, _, other = line.partition(" ")
        try:
            if command == "/compare":
                models = [models[0], *(name for name in [other] if name and chat.talker(name))]
            elif command == "/reset":
                turns = []
            elif line.startswith("/"):
                print(HELP)
            elif line:
                turns.append(dict(message=line, answers={}))
                show(chat, models, turns)
        except UserError as error:
            print(error)
        except KeyboardInterrupt:                    # what has come of the answer stays
            print()


def main(cfg):
    chat = Chat(cfg, setup(cfg))
    talker = chat.talker(cfg.policy)
    if cfg.prompt:
        return show(chat, [cfg.policy], [dict(message=cfg.prompt, answers={})])
    print(f"model     {talker.model}\nprompts   {talker.before + '...' + talker.after!r}, "
          + ("after all earlier turns" if talker.remembers else "each alone"))
    if cfg.page:
        state = dict(model=cfg.policy, help=HELP)
        return serve(Path(__file__).with_suffix(".html"),
                     {"GET /state": lambda: state, "POST /say": chat.answers}, cfg)
    print(f"{HELP}\nCtrl-C           stop an answer; leave, where there is none")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")      # what comes need not be UTF-8
    with suppress(EOFError, KeyboardInterrupt):
        in_terminal(chat)
    print()


if __name__ == "__main__":
    run(main, ChatConfig)
