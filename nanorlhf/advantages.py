"""How much better than expected was it? One question, four answers.

    gae                    (B, R)  token by token, with a critic's help
    reinforce, rloo, grpo  (B,)    one number a response, no critic
"""
import torch

from nanorlhf.logprobs import masked


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """A_t = delta_t + gamma lam A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t

    Generalised advantage estimation (Schulman et al. 2016, eq. 16).
    lam = 0 trusts the critic, lam = 1 trusts the rewards. After the last token nothing comes: its
    V_{t+1} is 0, whatever stands behind the mask. All (B, R) -> advantages (B, R), 0 off the mask
    """
    rewards, values = masked(rewards, mask), masked(values, mask)
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    for t in reversed(range(rewards.shape[1])):
        advantages[:, t] = following = deltas[:, t] + gamma * lam * following
    return masked(advantages, mask)


def reinforce(scores):
    """Each score against the mean of the batch (Williams 1992, with a baseline). (B,) -> (B,)"""
    return scores - scores.mean()


def rloo(scores, G):
    """Each score against the mean of the other G - 1 responses to the same prompt: an unbiased
    baseline (Kool et al. 2019; Ahmadian et al. 2024, eq. 7). Rows of a prompt stand together.

    (B,) -> (B,)
    """
    groups = scores.view(-1, G)
    baseline = (groups.sum(1, keepdim=True) - groups) / (G - 1)
    return (groups - baseline).flatten()


def grpo(scores, G):
    """Each score in standard deviations of its prompt's G responses (Shao et al. 2024, 4.1.2).

    Dividing by the deviation is what makes it biased: prompts on which all responses are nearly
    alike count as much as the others. (B,) -> (B,)
    """
    groups = scores.view(-1, G)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()
