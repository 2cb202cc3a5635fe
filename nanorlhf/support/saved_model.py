"""What every network of the course shares: saving, loading and growing the vocabulary."""
from dataclasses import asdict, replace

import torch
import torch.nn as nn

from nanorlhf.support import UserError, pretrained


class SavedModel(nn.Module):
    """A network with a GPT-2 trunk, `self.transformer`, and a head of its own.

    A subclass sets config_class, trunk_class, and the name of its architecture in config.json.
    """
    settings = {}       # what else config.json says
    compiled = False    # by config.compile_trunks: then each new shape waits for the compiler

    def __init__(self, config):
        super().__init__()
        self.config, self.transformer = config, self.trunk_class(config)

    @property
    def device(self):
        return self.transformer.wte.weight.device

    def __str__(self):
        c, size = self.config, sum(p.numel() for p in self.parameters())
        return (f"{c.n_layer} layers x {c.n_embd}, {size / 1e6:.2f} M parameters, "
                f"vocabulary {c.vocab_size:,}")

    def save(self, folder, tok=None, **extra):
        """Write config.json, with extra in it, model.safetensors, and the tokenizer's files."""
        extra = self.settings | (tok.special if tok else {}) | extra
        pretrained.save(folder, self.architecture, asdict(self.config), self.state_dict(), **extra)
        if tok:
            tok.save(folder)

    @classmethod
    def load(cls, folder, dropout=0.0, fresh_head=True):
        """The model in a folder, or GPT-2 by the name "gpt2", "gpt2-medium" and so on; eval mode.

        A scalar head that the folder lacks stays newly initialised, unless fresh_head is False:
        so a reward model starts from a language model. Raises UserError where it is no such model.
        """
        config, tensors = pretrained.load(folder)
        for kind in cls.__subclasses__():                 # a QGPT is a GPT as well
            if config["architectures"] == [vars(kind).get("architecture")]:
                cls, fresh_head = kind, False
        shape = cls.config_class(**pretrained.sizes(config, len(tensors), folder), dropout=dropout)
        with torch.device("meta"):       # no memory yet: a stranger's config may ask for any size
            expected = cls(shape).state_dict()
        pretrained.check(tensors, expected, "transformer." if fresh_head else "", folder)
        model = cls(shape)
        model.load_state_dict(tensors, strict=False)
        return model.eval()

    @torch.no_grad()
    def resize_vocab(self, n):
        """Grow the vocabulary to n tokens: GPT-2 as published has no pad token. -> self

        A new row is the mean of the old ones, so its probability stays below 1 / V. A row of zeros
        would have logit 0, where the others of GPT-2 have about -35: it would always be chosen.
        """
        rows = self.transformer.wte.weight
        if n < len(rows):
            raise UserError(f"expected a tokenizer of at least the model's {len(rows):,} tokens, "
                            f"came one of {n:,}")
        rows = torch.cat([rows, rows.mean(0).expand(n - len(rows), -1)])
        self.transformer.wte = nn.Embedding.from_pretrained(rows, freeze=False)
        self.config = self.transformer.config = replace(self.config, vocab_size=n)
        return self

    def check_reads(self, writer, same_vocabulary, folder):
        """Raise UserError where this reward model, of the folder, cannot read all of the writer."""
        if not same_vocabulary:
            raise UserError(f"{folder}: expected a reward model with the policy's vocabulary, came "
                            "one with another: they would read each other's tokens as other words")
        ours, theirs = self.config.n_positions, writer.config.n_positions
        if ours < theirs:
            raise UserError(f"{folder}: expected a reward model that reads {theirs} tokens as the "
                            f"policy does, came one of {ours}")
