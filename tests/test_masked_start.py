"Laws of overlaps in three blocks of memory"

import warnings

import numpy as np
import pytest
import torch

from hessian_overlap import masked_start
from hessian_overlap.krylov import BlockLanczos
from hessian_overlap.linop import FunctionLinearOperator
from hessian_overlap.masked_start import ShortLanczos, overlap_slq_masked, tsqr_
from hessian_overlap.synthmat import SynthOperator, synth_eigvals

f64 = torch.float64
DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
N = 900
SPECTRA = {
    'slow tail, both signs': dict(kind='poly', rank=1, decay=0.7, seed=1),
    'slow tail, positive': dict(kind='poly', rank=1, decay=0.7),
    'fast tail': dict(kind='exp', rank=5, decay=0.005, seed=2),
}


@pytest.fixture(params=SPECTRA)
def lam(request):
    return synth_eigvals(N, **SPECTRA[request.param])


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def case(lam, seed=0, **kw):
    A = SynthOperator(lam, seed=7, **kw)
    U = A.eigvecs(500).double().cpu()
    order = (U[:, :200].square().sum(1) * torch.from_numpy(np.random.default_rng(seed).random(N))).argsort(
        descending=True
    )
    ks = torch.tensor([60, 150, 450])
    return A, order, ks, torch.stack([U[order[:k]][:, :k].square().sum() / k for k in ks.tolist()])


def quiet(f, *a, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        return f(*a, **kw)


@pytest.mark.parametrize('dtype', [torch.float32, f64])
@pytest.mark.parametrize('shape', [(8, 8), (100, 3), (1000, 12)], ids=str)
@pytest.mark.parametrize('strip', [7, 64, 2**18])
def test_qr_in_place(shape, strip, dtype, device, monkeypatch):
    monkeypatch.setattr(masked_start, 'STRIP', strip)
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype).to(device)
    W[:, 0] *= 1e-6
    W[:, -1] = W[:, 1]  # badly scaled and dependent
    for layout in (W.clone(), W.T.contiguous().T):
        Q = layout.clone(memory_format=torch.preserve_format)
        R = tsqr_(Q)
        eps = torch.finfo(dtype).eps
        assert (Q.cpu().double() @ R - W.cpu().double()).norm() <= 50 * eps * W.norm()
        assert (Q.cpu().double().T @ Q.cpu().double() - torch.eye(shape[1], dtype=f64)).norm() <= 50 * eps * shape[1]


def test_first_steps_are_those_of_block_lanczos(lam, device):
    A, order, ks, _ = case(lam, device=device)
    s = ShortLanczos(A, order, ks, num_probes=2, seed=3)
    full = BlockLanczos(A, 8, start=s.X.clone(), seed=0)
    for _ in range(4):
        s.step()
        full.step()
    torch.testing.assert_close(s.nodes()[0], full.ritz()[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(s.nodes(2)[0], full.ritz(16)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, f64])
def test_weights_add_up_to_the_sizes_of_the_rings(lam, dtype, device):
    A, order, ks, _ = case(lam, dtype=dtype, device=device)
    s = ShortLanczos(A, order, ks, num_probes=3, seed=0)
    for _ in range(60):
        s.step()  # far beyond convergence of the leading pairs
    sizes = torch.tensor([60.0, 90.0, 300.0, 450.0], dtype=f64)
    torch.testing.assert_close(
        s.nodes()[1].sum(0), sizes.expand(3, 4), rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=0
    )
    assert s.nodes()[0].abs().max() <= lam.abs().max() * (
        1 + (1e-4 if dtype == torch.float32 else 1e-10)
    )  # copies, but nothing outside the spectrum


@pytest.mark.parametrize('strip', [50, 333])
def test_strips_do_not_matter(strip, monkeypatch):
    A, order, ks, _ = case(synth_eigvals(N, **SPECTRA['slow tail, positive']))
    a = quiet(overlap_slq_masked, A, order, ks, num_probes=3, num_steps=10, seed=0)
    monkeypatch.setattr(masked_start, 'STRIP', strip)
    b = quiet(overlap_slq_masked, A, order, ks, num_probes=3, num_steps=10, seed=0)
    torch.testing.assert_close(a.overlap, b.overlap, rtol=1e-8, atol=0)


@pytest.mark.parametrize('probes, steps', [(6, 25), (1, 50), (3, 10)])
def test_the_interval_covers(lam, probes, steps):
    hits = trials = 0
    for seed in range(10):
        A, order, ks, truth = case(lam, seed)
        e = quiet(overlap_slq_masked, A, order, ks, num_probes=probes, num_steps=steps, seed=seed)
        ok = (e.low <= truth) & (truth <= e.high)
        hits, trials = hits + int(ok.sum()), trials + len(ks)
        assert (
            (e.low <= e.overlap).all()
            and (e.overlap <= e.high).all()
            and ((ks <= e.info['resolved']) | ~e.info['trusted']).all()
        )
    assert hits >= 0.9 * trials


def test_a_full_mask_of_probes_averages_to_the_truth():
    A, order, ks, truth = case(synth_eigvals(N, **SPECTRA['slow tail, both signs']))
    runs = torch.stack([
        quiet(overlap_slq_masked, A, order, ks, num_probes=6, num_steps=40, seed=s).overlap for s in range(12)
    ])
    assert ((runs.mean(0) - truth).abs() < 4 * runs.std(0) / 12**0.5 + 2e-3 * truth).all()


def test_continued_and_loaded_are_bit_equal(tmp_path, device):
    A, order, ks, _ = case(synth_eigvals(N, **SPECTRA['slow tail, positive']), device=device, dtype=torch.float32)
    at_once = quiet(overlap_slq_masked, A, order, ks, num_probes=2, num_steps=14, seed=4)
    part = quiet(overlap_slq_masked, A, order, ks, num_probes=2, num_steps=6, seed=4)
    part.info['state'].save(tmp_path / 's.pt')
    for start in (ShortLanczos.load(tmp_path / 's.pt', A), part):
        on = quiet(overlap_slq_masked, A, order, ks, num_probes=2, num_steps=14, start=start, seed=4)
        assert torch.equal(on.overlap, at_once.overlap) and torch.equal(on.stderr, at_once.stderr)
    assert [f.name for f in tmp_path.iterdir()] == ['s.pt']


def test_an_interrupted_step_leaves_the_state_as_it_was():
    lam = synth_eigvals(N, **SPECTRA['slow tail, positive'])
    A, order, ks, _ = case(lam)
    fail = []

    def mm(V):
        if fail:
            raise KeyboardInterrupt
        return A @ V

    B = FunctionLinearOperator(mm, A.shape, rmatmat=mm, dtype=f64, device='cpu')
    s, t = (ShortLanczos(B, order, ks, num_probes=2, seed=0) for _ in range(2))
    for _ in range(3):
        s.step()
        t.step()
    fail.append(1)
    with pytest.raises(KeyboardInterrupt):
        s.step()
    fail.clear()
    assert torch.equal(s.step().nodes()[0], t.step().nodes()[0])


def test_an_operator_that_returns_its_argument():
    I = FunctionLinearOperator(lambda V: V, (N, N), rmatmat=lambda V: V, dtype=f64, device='cpu')
    s = ShortLanczos(I, torch.arange(N), torch.tensor([10]), num_probes=2, seed=0)
    for _ in range(3):
        s.step()
    theta, W = s.nodes()
    torch.testing.assert_close((theta[:, None, None] * W).sum(0), W.sum(0), rtol=1e-10, atol=1e-10)  # z'Iz = z'z


@pytest.mark.parametrize('damage', ['kind', 'dtype', 'size'])
def test_states_of_something_else_are_refused(damage, tmp_path):
    A, order, ks, _ = case(synth_eigvals(N, **SPECTRA['fast tail']))
    f = tmp_path / 's.pt'
    if damage == 'kind':
        torch.save(dict(kind='other'), f)
        other = A
    else:
        ShortLanczos(A, order, ks, num_probes=2, seed=0).save(f)
        other = SynthOperator(
            synth_eigvals(N if damage == 'dtype' else 400, 'poly', rank=1, decay=0.7),
            seed=0,
            dtype=torch.float32 if damage == 'dtype' else f64,
        )
    with pytest.raises(ValueError, match='no ShortLanczos' if damage == 'kind' else 'the state is of a'):
        ShortLanczos.load(f, other)
