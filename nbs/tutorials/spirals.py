"Two spirals, told apart by a small network: a problem of one's own for `hessian-overlap run spirals.py`"
import torch
from torch import nn

from hessian_overlap import Problem


def spirals(samples, generator):
    "Points (samples, 2) on two spirals, and on which of them each lies"
    y = torch.arange(samples) % 2
    t = 3*torch.rand(samples, generator=generator).sqrt()
    angle = 2*t + torch.pi*y
    x = torch.stack([t*angle.cos(), t*angle.sin()], 1)
    return x + .05*torch.randn(samples, 2, generator=generator), y


def make_problem(seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2))
    train, test = spirals(1000, g), spirals(500, g)
    settings = dict(batch_size=100, lr=.3, num_classes=2, seed=seed)
    return Problem('spirals', model.eval(), nn.CrossEntropyLoss(), *train, *test, **settings)
