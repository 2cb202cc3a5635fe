"""Direct preference optimisation (Rafailov et al. 2023): the reward model's loss, without one.

A policy that is best for some reward under a KL price beta betrays that reward: it is
beta (log pi - log pi_ref), up to a constant that every response to a prompt shares. So the
Bradley-Terry loss can be put on the policy itself.
"""
from nanorlhf.reward import bradley_terry_loss


def dpo_loss(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs,
             beta=0.1):
    """-log sigmoid of the margin between the implicit rewards (Rafailov et al. 2023, eq. 7)

    Log-probs of whole responses, summed over their tokens. All (B,) -> scalar
    """
    chosen, rejected = (beta * (logprobs - ref_logprobs) for logprobs, ref_logprobs in (
        (chosen_logprobs, ref_chosen_logprobs), (rejected_logprobs, ref_rejected_logprobs)))
    return bradley_terry_loss(chosen, rejected)
