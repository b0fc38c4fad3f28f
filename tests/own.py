"A problem of one's own that is measured in a moment, for tests of runs, in this process and in others."

import torch

from hessian_overlap.problems import Problem


def make_problem(seed=0, lr=0.5, hidden=5, activation=torch.nn.Tanh, smoothing=0.0, data=0):
    g = torch.Generator().manual_seed(data)
    x = torch.randn(200, 3, generator=g, dtype=torch.float64)
    y = (x[:, 0] + x[:, 1] * x[:, 2] > 0).long()
    net = torch.nn.Sequential(torch.nn.Linear(3, hidden), activation(), torch.nn.Linear(hidden, 2)).double().eval()
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / 2)
    loss = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
    return Problem(
        'mine',
        net,
        loss,
        x[:150],
        y[:150],
        x[150:],
        y[150:],
        batch_size=50,
        lr=lr,
        num_classes=2,
        seed=seed,
        source='drawn here',
    )


if __name__ == '__main__':  # a run in a process of its own: own.py FOLDER
    import sys

    from hessian_overlap.experiment import run_overlap
    from hessian_overlap.methods import Eigsh

    torch.set_num_threads(1)
    asked = dict(steps=10, snapshots=[0, 5, 10], samples=30, num_random=3, seeds=(0, 1), progress=False)
    run_overlap(make_problem, Eigsh(k=6), out=sys.argv[1], **asked)
