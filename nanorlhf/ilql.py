"""The value loss of implicit language Q-learning (Snell et al. 2022), and no more of it yet."""
from nanorlhf.logprobs import masked_mean


def expectile_loss(q, v, mask, tau=0.7):
    """|tau - 1[q < v]| (q - v)^2: v is drawn to the tau-expectile of q, above its mean if tau > 1/2
    (Kostrikov et al. 2021, eq. 5). Where q exceeds v the square counts tau, elsewhere 1 - tau.

    All (B, R) -> scalar
    """
    gap = q - v
    return masked_mean((tau - (gap < 0).to(gap.dtype)).abs() * gap ** 2, mask)
