"The paper's networks: their sizes, their outputs, and that they are functions of a seed."

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from hessian_overlap.models import ResNet18, cifar10_3c3d, cifar100_allcnnc, mnist_mlp, resnet18, seeded

DEVICES = ['cpu'] + ['cuda'] * torch.cuda.is_available()
DTYPES = torch.float32, torch.float64


def small_resnet(**kw):
    return resnet18(10, small_input=True, **kw)


# name: (function, input shape, classes, parameters, tensors)
NETS = dict(
    mnist_mlp=(mnist_mlp, (256,), 10, 7030, 12),
    cifar10_3c3d=(cifar10_3c3d, (3, 32, 32), 10, 895_210, 12),
    cifar100_allcnnc=(cifar100_allcnnc, (3, 32, 32), 100, 1_387_108, 18),
    resnet18=(resnet18, (3, 224, 224), 1000, 11_689_512, 62),
    small_resnet=(small_resnet, (3, 32, 32), 10, 11_173_962, 62),
)
each = pytest.mark.parametrize('name', NETS)


def vec(model):
    return parameters_to_vector(model.parameters()).detach()


def images(shape, n=2, seed=0, **kw):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)).to(**kw)


@each
def test_sizes(name):
    make, shape, classes, n, tensors = NETS[name]
    net = make(seed=0, device='cpu')
    assert sum(p.numel() for p in net.parameters()) == n and len(list(net.parameters())) == tensors
    assert all(p.requires_grad and p.is_leaf and p.device.type == 'cpu' for p in net.parameters())
    assert not any(m.training for m in net.modules())
    with torch.no_grad():
        out = net(images(shape))
    assert out.shape == (2, classes) and out.isfinite().all() and not torch.equal(out[0], out[1])


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', DTYPES)
@each
def test_same_parameters_in_every_dtype_on_every_device(name, dtype, device):
    make, shape, *_ = NETS[name]
    net, cpu = make(seed=3, dtype=dtype, device=device), make(seed=3, device='cpu')
    assert {(p.dtype, p.device.type) for p in net.parameters()} == {(dtype, device)}
    assert torch.equal(vec(net).cpu(), vec(cpu).to(dtype))
    for (k, a), b in zip(cpu.named_buffers(), net.buffers()):
        assert torch.equal(b.cpu(), a.to(b.dtype)), k
    if name != 'resnet18':
        assert net(images(shape, dtype=dtype, device=device)).dtype == dtype


@each
def test_seeds(name):
    make = NETS[name][0]
    a, b, c = (vec(make(seed=s, device='cpu')) for s in (5, 5, 6))
    assert torch.equal(a, b) and (a != c).float().mean() > 0.9
    assert torch.equal(vec(make(seed=np.int64(5), device='cpu')), a)
    for bad in -1, 2**32:
        with pytest.raises(ValueError, match='a seed is an integer from 0'):
            make(seed=bad, device='cpu')
    for bad in 1.5, '0', None, True, float('nan'):
        with pytest.raises(TypeError, match='a seed is an integer from 0'):
            make(seed=bad, device='cpu')
    with pytest.raises(TypeError):
        make(device='cpu')  # a seed is required
    with pytest.raises(ValueError, match="want 'cpu', 'cuda' or 'cuda:0'"):
        make(seed=0, device='gpu')


@each
def test_the_global_generators_are_neither_read_nor_moved(name):
    make = NETS[name][0]
    torch.manual_seed(1)
    want = vec(make(seed=5, device='cpu'))
    torch.manual_seed(2)
    before, np_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(vec(make(seed=5, device='cpu')), want)
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == np_before).all()


@each
def test_default_dtype_device_and_grad_mode_do_not_matter(name):
    make = NETS[name][0]
    want = make(seed=0, device='cpu')

    def same(net):
        for (k, a), (l, b) in zip(want.state_dict().items(), net.state_dict().items(), strict=True):
            assert k == l and a.dtype == b.dtype and torch.equal(a, b), k
        assert all(p.requires_grad for p in net.parameters())

    try:
        torch.set_default_dtype(torch.float64)
        same(make(seed=0, device='cpu'))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device('meta'):
        net = make(seed=0, device='cpu')
    same(net)
    with torch.no_grad():
        net = make(seed=0, device='cpu')
    same(net)
    with torch.inference_mode():
        net = make(seed=0, device='cpu')
    for p, q in zip(net.parameters(), want.parameters()):
        assert torch.equal(p, q)


PLAIN = dict(
    resnet18=lambda: ResNet18(),
    small_resnet=lambda: ResNet18(10, True),
    bare=lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False),
        nn.Conv1d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Linear(3, 1, bias=False),
        nn.BatchNorm1d(3, affine=False),
    ),
    nested=lambda: nn.Sequential(
        nn.Linear(7, 5), nn.Sequential(nn.Dropout(), nn.Linear(5, 3), nn.BatchNorm1d(3)), nn.Linear(3, 300)
    ),
)


@pytest.mark.parametrize('seed', [0, 2**32 - 1])
@pytest.mark.parametrize('name', PLAIN)
def test_the_numbers_are_those_of_the_plain_constructors(name, seed):
    ours = seeded(PLAIN[name], seed=seed, device='cpu')
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs = PLAIN[name]()
    for (k, a), (l, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert k == l and a.dtype == b.dtype and torch.equal(a, b), k


@pytest.mark.parametrize('name', ['mnist_mlp', 'cifar10_3c3d', 'cifar100_allcnnc'])
def test_the_numbers_are_those_of_the_layers_reset_in_order(name):
    ours = NETS[name][0](seed=11, device='cpu')
    theirs = copy.deepcopy(ours)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        for m in theirs.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                m.reset_parameters()
    assert torch.equal(vec(ours), vec(theirs))


@pytest.mark.parametrize('layer', [lambda: nn.LSTM(2, 3), lambda: nn.LayerNorm(3), lambda: nn.Embedding(3, 2)])
def test_seeded_refuses_layers_whose_default_it_does_not_know(layer):
    with pytest.raises(TypeError, match='initialise it yourself'):
        seeded(lambda: nn.Sequential(nn.Linear(2, 2), layer()), seed=0, device='cpu')


@pytest.mark.parametrize('name', ['cifar10_3c3d', 'cifar100_allcnnc', 'small_resnet'])
def test_a_sample_does_not_see_the_rest_of_its_batch(name):
    make, shape, *_ = NETS[name]
    net, x = make(seed=0, dtype=torch.float64, device='cpu'), images(NETS[name][1], 3, dtype=torch.float64)
    with torch.no_grad():
        whole = net(x)
        for i in range(3):
            assert torch.allclose(net(x[i : i + 1])[0], whole[i], rtol=1e-10, atol=1e-12)
        assert torch.equal(net(x), whole)


def test_dropout_is_there_and_off():
    net, x = cifar100_allcnnc(seed=0, device='cpu'), images((3, 32, 32))
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.5, 0.5]
    with torch.no_grad():
        off = net(x)
        assert off.min() >= 0  # the last layer is a ReLU
        with torch.random.fork_rng():
            assert not torch.equal(net.train()(x), off)


@pytest.mark.parametrize('size', [6, 12, 28])
def test_ceil_mode_is_tensorflows_same_padding_on_even_maps(size):
    x = images((5, size, size)).relu()
    pad = nn.functional.max_pool2d(nn.functional.pad(x, (0, 1, 0, 1)), 3, 2)
    assert torch.equal(nn.functional.max_pool2d(x, 3, 2, ceil_mode=True), pad)


def test_resnet_names_are_torchvisions():
    keys = set(resnet18(seed=0, device='cpu').state_dict())
    bn = [f'{e}' for e in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')]
    want = {'conv1.weight', 'fc.weight', 'fc.bias'} | {f'bn1.{e}' for e in bn}
    for i in range(1, 5):
        for j in range(2):
            want |= {f'layer{i}.{j}.conv{c}.weight' for c in (1, 2)} | {
                f'layer{i}.{j}.bn{c}.{e}' for c in (1, 2) for e in bn
            }
        if i > 1:
            want |= {f'layer{i}.0.downsample.0.weight'} | {f'layer{i}.0.downsample.1.{e}' for e in bn}
    assert keys == want and len(keys) == 122


def test_problems_has_them_too():
    import hessian_overlap.problems as P

    assert (P.mnist_mlp, P.cifar10_3c3d, P.cifar100_allcnnc, P.resnet18) == (
        mnist_mlp,
        cifar10_3c3d,
        cifar100_allcnnc,
        resnet18,
    )
