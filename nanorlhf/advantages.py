"""How much better than expected was it? One question, four answers.

    gae                    (B, R)  token by token, with the help of a critic
    reinforce, rloo, grpo  (B,)    response by response; the G responses to a prompt stand together
"""
import torch
from torch import Tensor

from nanorlhf.logprobs import masked


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0,
        lam: float = 0.95) -> Tensor:
    """A_t = delta_t + gamma lam A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t

    Generalised advantage estimation (Schulman et al. 2016, eq. 16): lam = 0 trusts the critic, 1
    the rewards. After the last token V_{t+1} is 0. All (B, R) -> (B, R), 0 off the mask
    """
    rewards, values = masked(rewards, mask), masked(values, mask)
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    for t in reversed(range(rewards.shape[1])):
        advantages[:, t] = following = deltas[:, t] + gamma * lam * following
    return masked(advantages, mask)


def reinforce(scores: Tensor) -> Tensor:
    """Each score minus the mean of the batch (Williams 1992, with a baseline). (B,) -> (B,)"""
    return scores - scores.mean()


def rloo(scores: Tensor, G: int) -> Tensor:
    """Each score minus the mean of the other G - 1 responses to the same prompt: a baseline that
    does not bias the gradient (Kool et al. 2019; Ahmadian et al. 2024, eq. 7). (B,) -> (B,)
    """
    groups = scores.view(-1, G)
    baseline = (groups.sum(1, keepdim=True) - groups) / (G - 1)
    return (groups - baseline).flatten()


def grpo(scores: Tensor, G: int) -> Tensor:
    """Each score in standard deviations of its prompt's G responses (Shao et al. 2024, 4.1.2).

    The division makes it biased: prompts whose responses are nearly alike count as much as others.
    (B,) -> (B,)
    """
    groups = scores.view(-1, G)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def of_responses(method: str, scores: Tensor, penalty: Tensor, G: int) -> Tensor:
    """The advantage of each response under a KL penalty, by reinforce, rloo or grpo. (B,) -> (B,)

    GRPO divides by the deviation of the scores alone and subtracts the penalty undivided, as in the
    loss of Shao et al. 2024, eq. 3. Divided too, it would be about 1 where all scores of a prompt
    are equal, whatever kl_coef is.
    """
    if method == "grpo":
        return grpo(scores, G) - rloo(penalty, G)
    return reinforce(scores - penalty) if method == "reinforce" else rloo(scores - penalty, G)
