"""RLHF, the whole of it: imitate, learn what people prefer, improve.

Read in this order:

    environment.py                       the built-in world, where the true reward is known
    tokenizer.py  attention.py  model.py  generate.py      a small GPT that writes
    logprobs.py  advantages.py           the sums that everything below is made of
    sft.py  reward.py  ppo.py            imitate, judge, improve
    dpo.py  ilql.py                      other losses that learn from the same data
    evaluate.py                          did it help?

support/ is what any training program needs, experiments/ measures all this, people/ asks people.
Every sequence is flush left: tokens (B, T) holds prompt, response, padding. Dimension key:

    B  sequences          V  vocabulary              S  cached positions
    P  longest prompt     C  channels                G  responses per prompt
    R  longest response   H  heads
    T  = P + R            D  = C / H, channels of a head
"""
