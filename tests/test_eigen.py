"Laws of the eigensolvers: one table of matrices of known spectrum, every law over all of them and both solvers"

import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh as scipy_eigsh

from hessian_overlap.krylov import BlockLanczos, eigsh
from hessian_overlap.linop import FunctionLinearOperator
from hessian_overlap.noise import column_noise
from hessian_overlap.sketch import EighResult, TestMatrix, seigh
from hessian_overlap.synthmat import SynthOperator, synth_eigvals

DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
f64 = torch.float64

SPECTRA = {  # name: eigenvalues
    'slow tail, both signs': synth_eigvals(500, 'poly', rank=1, decay=0.7, seed=1),
    'slow tail, positive': synth_eigvals(500, 'poly', rank=1, decay=0.7),
    'plateau of 20': synth_eigvals(500, 'poly', rank=20, decay=1.5, seed=2)
    * torch.cat([torch.linspace(2, 1, 20, dtype=f64), torch.ones(480, dtype=f64)]),
    'exponential': synth_eigvals(500, 'exp', rank=1, decay=0.05, seed=3),
    'low rank + noise': synth_eigvals(500, 'lowrank', rank=40, noise=0.05, seed=4)
    * torch.linspace(2, 1, 500, dtype=f64),
    'repeated in pairs': synth_eigvals(250, 'poly', rank=1, decay=0.7, seed=5).repeat_interleave(2),
    'plus and minus': synth_eigvals(250, 'poly', rank=1, decay=0.7).repeat_interleave(2)
    * torch.tensor([1.0, -1.0], dtype=f64).repeat(250),
    'huge scale': 1e12 * synth_eigvals(500, 'poly', rank=1, decay=0.7, seed=6),
    'tiny scale': 1e-12 * synth_eigvals(500, 'poly', rank=1, decay=0.7, seed=6),
}


@pytest.fixture(params=SPECTRA)
def lam(request):
    return SPECTRA[request.param]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def lost(U, V):
    return 1 - (U.T.double() @ V.double()).square().sum().item() / U.shape[1]


@pytest.mark.parametrize('k', [1, 10, 60])
@pytest.mark.parametrize('b', [1, 8, 25])
def test_eigsh_is_exact(lam, k, b, device):
    A = SynthOperator(lam, seed=7, device=device)
    if b == 1 and (A.eigvals.diff() == 0).any():
        pytest.skip('a block of one sees one copy of an eigenvalue, as the page says')
    k = k + 1 if A.eigvals[k - 1].abs() == A.eigvals[k].abs() else k  # do not cut through a pair
    r = eigsh(A, k, block_size=b, tol=1e-6, seed=0)
    scale = lam.abs().max().item()
    assert r.info['converged'] and isinstance(r, EighResult)
    torch.testing.assert_close(r.eigvals.abs(), A.eigvals[:k].abs(), rtol=1e-10, atol=1e-13 * scale)
    assert abs(lost(A.eigvecs(k), r.eigvecs)) < 1e-9
    assert abs(r.info['next_eigval']) <= r.eigvals[-1].abs().item() * (1 + 1e-9)


@pytest.mark.parametrize('dtype', [torch.float32, f64])
@pytest.mark.parametrize('tol', [1e-2, 1e-5])
def test_residuals_are_what_info_says(lam, dtype, tol, device):
    A = SynthOperator(lam, seed=7, dtype=dtype, device=device)
    r = eigsh(A, 30, tol=tol, seed=0)
    true = (A @ r.eigvecs - r.eigvecs * r.eigvals).norm(dim=0).cpu().double()
    scale, eps = lam.abs().max().item(), torch.finfo(dtype).eps
    assert (true <= r.info['residual_norms'] * 1.05 + 20 * eps * scale).all()
    assert (
        true
        <= torch.maximum(tol * r.eigvals.abs().cpu().double(), torch.tensor(4 * eps * scale)) * 1.05 + 20 * eps * scale
    ).all()
    assert r.eigvals.dtype == dtype == r.eigvecs.dtype and r.eigvecs.device == A.device
    torch.testing.assert_close(
        r.eigvecs.T @ r.eigvecs, torch.eye(30, dtype=dtype, device=device), rtol=0, atol=200 * eps
    )


def test_projector_does_not_depend_on_block_or_seed(lam):
    A, out = SynthOperator(lam, seed=7), []
    k = 24 if A.eigvals[23].abs() != A.eigvals[24].abs() else 25
    for b, s in ((4, 0), (10, 1), (24, 2), (100, 3)):
        out.append(eigsh(A, k, block_size=b, tol=1e-8, seed=s).eigvecs)
    for U in out[1:]:
        assert (U @ U.T - out[0] @ out[0].T).abs().max() < 1e-7


@pytest.mark.parametrize('which', ['LM', 'LA', 'SA', 'BE'])
def test_which_is_as_in_scipy(which):
    A = SynthOperator(SPECTRA['slow tail, both signs'], seed=7)
    for k in (2, 9) if which == 'BE' else (1, 2, 9):  # ARPACK has no 'BE' for one
        ref = np.sort(scipy_eigsh(A.to_scipy(), k=k, which=which, return_eigenvectors=False, tol=1e-10))
        np.testing.assert_allclose(np.sort(eigsh(A, k, which=which, tol=1e-8, seed=0).eigvals.numpy()), ref, rtol=1e-9)


@pytest.mark.parametrize('k, b, limit', [(5, 10, 7), (5, None, 5), (1, 20, 1), (3, 2, 3), (12, None, 12)])
def test_budget_smaller_than_a_block(k, b, limit):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        r = eigsh(SynthOperator(SPECTRA['slow tail, both signs'], seed=7), k, block_size=b, max_matvecs=limit, seed=0)
    assert (
        r.info['matvecs'] <= limit
        and len(r.eigvals) == k
        and r.info['converged'] is False
        and 'NOT CONVERGED' in repr(r)
    )


def test_order():
    A = SynthOperator(SPECTRA['slow tail, both signs'], seed=7)
    assert (eigsh(A, 20, seed=0).eigvals.abs().diff() <= 0).all() and (
        eigsh(A, 20, which='LA', seed=0).eigvals.diff() <= 0
    ).all()
    assert (eigsh(A, 20, which='SA', seed=0).eigvals.diff() >= 0).all() and (
        seigh(A, 20, seed=0).eigvals.abs().diff() <= 0
    ).all()


@pytest.mark.parametrize(
    'solve', [lambda A, s: eigsh(A, 12, seed=s), lambda A, s: seigh(A, 12, seed=s)], ids=['eigsh', 'seigh']
)
def test_seed_is_the_only_randomness(solve):
    A = SynthOperator(SPECTRA['slow tail, both signs'], seed=7)
    state = torch.get_rng_state()
    a = solve(A, 3)
    torch.rand(5)
    np.random.rand(3)
    b = solve(A, 3)
    torch.set_rng_state(state)
    assert torch.equal(a.eigvecs, b.eigvecs) and torch.equal(a.eigvals, b.eigvals)
    assert not torch.equal(solve(A, 4).eigvecs, a.eigvecs)


@pytest.mark.parametrize(
    'diag',
    [[0.0] * 12, [1.0] * 12, [2.0] + [0.0] * 11, [3.0] * 7 + [-3.0] * 5, list(range(12)), [5.0] * 2 + [1.0] * 10],
)
@pytest.mark.parametrize('k', [1, 2, 7, 12])
@pytest.mark.parametrize('b', [1, 3, 12])
def test_degenerate(diag, k, b):
    D = torch.diag(torch.tensor(diag, dtype=f64))
    r = eigsh(D, k, block_size=b, seed=0)
    ref = D.diagonal()[D.diagonal().abs().argsort(descending=True, stable=True)][:k]
    torch.testing.assert_close((D @ r.eigvecs), r.eigvecs * r.eigvals, rtol=0, atol=1e-12)
    torch.testing.assert_close(r.eigvecs.T @ r.eigvecs, torch.eye(k, dtype=f64), rtol=0, atol=1e-12)
    assert r.info['matvecs'] <= 12
    torch.testing.assert_close(r.eigvals.abs(), ref.abs(), rtol=0, atol=1e-12)


@pytest.mark.parametrize('n', [1, 2, 5])
def test_tiny_spaces(n):
    g = torch.Generator().manual_seed(n)
    M = torch.randn(n, n, generator=g, dtype=f64)
    M = M + M.T
    for k in range(1, n + 1):
        r = eigsh(M, k, seed=0)
        ref = torch.linalg.eigvalsh(M)
        torch.testing.assert_close(r.eigvals.abs(), ref.abs().sort(descending=True).values[:k], rtol=1e-12, atol=1e-12)
        assert (
            seigh(M, k, num_outer=n, num_inner=n, test_matrix='gauss', seed=0).eigvals.abs()
            - ref.abs().sort(descending=True).values[:k]
        ).abs().max() < 1e-8


def test_state_is_a_decomposition(lam):
    "A Q = Q T + X B Eᵀ, QᵀQ = I"
    A, s = SynthOperator(lam, seed=7), BlockLanczos(SynthOperator(lam, seed=7), 6, seed=1)
    for _ in range(20):
        s.step()
    m = s.size - s.newest
    Q, T, X = s.Q[:, :m], s._T[:m, :m], s.Q[:, m:]
    R = A @ Q - Q @ T
    R[:, m - 6 :] -= X @ s.B
    scale = lam.abs().max()
    assert (
        (R / scale).abs().max() < 1e-13
        and (s.Q.T @ s.Q - torch.eye(s.size, dtype=f64)).abs().max() < 1e-13
        and s.matvecs == m == 120
    )


@pytest.mark.parametrize('kind', ['ssrft', 'gauss', 'sign'])
@pytest.mark.parametrize('dtype', [torch.float32, f64])
def test_sketch_is_exact_at_full_rank(kind, dtype, device):
    lam = torch.zeros(400, dtype=f64)
    lam[:15] = torch.linspace(3, 1, 15, dtype=f64) * torch.tensor([1.0, -1.0, 1.0], dtype=f64).repeat(5)
    A = SynthOperator(lam, seed=1, dtype=dtype, device=device)
    for outer, inner in ((15, 30), (25, 60), (60, 60)):
        r = seigh(A, 15, num_outer=outer, num_inner=inner, test_matrix=kind, seed=3)
        tol = 5e-3 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(r.eigvals, A.eigvals[:15], rtol=tol, atol=tol)
        assert abs(lost(A.eigvecs(15), r.eigvecs)) < tol and r.info['matvecs'] == inner and r.info['converged'] is None
        torch.testing.assert_close(
            r.eigvecs.T @ r.eigvecs,
            torch.eye(15, dtype=dtype, device=device),
            rtol=0,
            atol=1e-5 if dtype == torch.float32 else 1e-12,
        )


def test_sketch_improves_with_size_and_eigsh_beats_it():
    A = SynthOperator(SPECTRA['slow tail, both signs'], seed=7)
    U = A.eigvecs(30)
    errs = [
        np.mean([lost(U, seigh(A, 30, num_outer=o, num_inner=2 * o, seed=s).eigvecs) for s in range(3)])
        for o in (35, 70, 140, 240)
    ]
    assert errs == sorted(errs, reverse=True) and errs[0] > 0.1
    r = eigsh(A, 30, seed=0)
    assert lost(U, r.eigvecs) < 1e-8 < errs[-1] and r.info['matvecs'] < 240


@pytest.mark.parametrize('m', [1, 63, 64, 65, 130])
def test_blocks_of_measurements_do_not_matter(m):
    "The sketch is made in chunks of 64 columns; its measurements are those of the whole test matrix"
    Omega = TestMatrix(200, m, 'ssrft', seed=4)
    W = Omega.columns(range(m))
    U = column_noise(200, range(3), seed=0)
    torch.testing.assert_close(Omega.T @ U, W.T @ U, rtol=0, atol=1e-10)


def _nan_after(n, calls):
    D, count = torch.linspace(1, 2, n, dtype=f64), [0]

    def mm(V):
        count[0] += 1
        W = D[:, None] * V
        if count[0] > calls:
            W[:, 2] = float('nan')
        return W

    return FunctionLinearOperator(mm, (n, n), rmatmat=mm, dtype=f64, device='cpu')


A0 = torch.diag(torch.arange(1.0, 41, dtype=f64))
M0 = column_noise(40, range(40), seed=0, kind='gauss')
FAULTS = {
    'k = 0': (lambda f: f(A0, 0, seed=0), ValueError, 'between 1 and n = 40, got 0'),
    'k > n': (lambda f: f(A0, 41, seed=0), ValueError, 'between 1 and n = 40, got 41'),
    'k not integer': (lambda f: f(A0, 2.5, seed=0), ValueError, 'k must be an integer'),
    'rectangular': (lambda f: f(M0[:, :3], 1, seed=0), ValueError, 'square'),
    'not finite': (lambda f: f(A0 * float('inf'), 1, seed=0), FloatingPointError, 'not finite in column 0'),
    'nan later': (lambda f: f(_nan_after(300, 1), 90, seed=0), FloatingPointError, 'not finite in column (2|66)'),
    'no seed': (lambda f: f(A0, 1), TypeError, 'seed'),
    'seed None': (lambda f: f(A0, 1, seed=None), (ValueError, TypeError), 'seed|integer|unsupported'),
    'not a matrix': (lambda f: f('A', 1, seed=0), TypeError, 'cannot make a linear operator'),
}


@pytest.mark.parametrize('solve', [eigsh, seigh], ids=['eigsh', 'seigh'])
@pytest.mark.parametrize('fault', FAULTS)
def test_faults(solve, fault):
    call, error, says = FAULTS[fault]
    with pytest.raises(error, match=says):
        call(solve)


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(which='SM'), 'which must be'),
        (dict(tol=-1), 'tol must be'),
        (dict(tol=1), 'tol must be'),
        (dict(tol=float('nan')), 'tol must be'),
        (dict(block_size=0), 'block_size must be'),
        (dict(block_size=41), 'block_size must be'),
        (dict(max_matvecs=2), 'below k'),
        (dict(max_basis=10), 'leaves no room'),
        (dict(tol_overlap=1e-3), 'needs mask'),
        (dict(tol_overlap=0, mask=torch.arange(3)), 'tol_overlap must be'),
        (dict(basis_place='nowhere'), 'existing folder'),
    ],
)
def test_eigsh_arguments(kw, says):
    with pytest.raises(ValueError, match=says):
        eigsh(A0, 5, seed=0, **kw)


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(num_outer=4), 'must hold'),
        (dict(num_outer=10, num_inner=9), 'must hold'),
        (dict(num_inner=41), 'must hold'),
        (dict(test_matrix='fft'), 'test_matrix must be'),
        (dict(recovery='lanczos'), 'recovery must be'),
    ],
)
def test_seigh_arguments(kw, says):
    with pytest.raises(ValueError, match=says):
        seigh(A0, 5, seed=0, **kw)


def test_not_symmetric_is_named():
    with pytest.raises(ValueError, match='not symmetric'):
        eigsh(M0, 3, seed=0)


def test_out_of_budget_says_so():
    A = SynthOperator(SPECTRA['slow tail, both signs'], seed=7)
    with pytest.warns(RuntimeWarning, match='not converged'):
        r = eigsh(A, 40, max_matvecs=45, seed=0)
    assert r.info['converged'] is False and 'NOT CONVERGED' in repr(r) and r.info['matvecs'] <= 45
    true = (A @ r.eigvecs - r.eigvecs * r.eigvals).norm(dim=0)
    torch.testing.assert_close(true, r.info['residual_norms'], rtol=1e-6, atol=1e-12)


# --- the basis: where it lies, in how many bits, how many columns ---------------------------------

BASES = {
    'restarts': dict(max_basis=60),
    'tight restarts': dict(max_basis=30),
    'float16': dict(basis_dtype=torch.float16),
    'bfloat16': dict(basis_dtype=torch.bfloat16),
    'float32': dict(basis_dtype=torch.float32),
    'bfloat16, restarts': dict(basis_dtype=torch.bfloat16, max_basis=60),
    'host': dict(basis_place='cpu'),
    'files': dict(basis_place='files'),
    'float16 in files': dict(basis_dtype=torch.float16, basis_place='files'),
}
LOST = {torch.float16: 1e-6, torch.bfloat16: 1e-4, torch.float32: 1e-9}


@pytest.mark.parametrize('basis', BASES)
@pytest.mark.parametrize(
    'which, name',
    [('LM', n) for n in SPECTRA]
    + [('LA', n) for n in SPECTRA]
    + [('BE', n) for n in SPECTRA if SPECTRA[n].min() < -0.1 * SPECTRA[n].max()],
)
def test_any_basis_gives_the_eigenspace(which, name, basis, device, tmp_path):
    lam, kw = SPECTRA[name], dict(BASES[basis])
    if kw.get('basis_place') == 'files':
        kw['basis_place'] = tmp_path
    A, scale = SynthOperator(lam, seed=7, device=device), lam.abs().max()
    k = 10 if which != 'LM' else 30 if A.eigvals[29].abs() != A.eigvals[30].abs() else 31
    if 'max_basis' in kw:
        kw['max_basis'] += k  # blocks of 10 and of 5
    want = {
        'LM': A.eigvals[:k],
        'LA': lam.sort(descending=True).values[:k],
        'BE': torch.cat([lam.sort(descending=True).values[: k - k // 2], lam.sort().values[: k // 2]]),
    }[which]
    r = eigsh(A, k, which=which, max_matvecs=1500, seed=0, **kw)
    half = torch.finfo(kw.get('basis_dtype', f64)).eps
    assert r.info['converged'] and (
        r.info['restarts'] > 0 or 'max_basis' not in kw or r.info['matvecs'] <= kw['max_basis']
    )
    torch.testing.assert_close(
        r.eigvals.cpu().abs() if which == 'LM' else r.eigvals.cpu(),
        want.cpu().abs() if which == 'LM' else want.cpu(),
        rtol=0,
        atol=(1e-7 + 4 * half) * scale,
    )
    assert (r.eigvecs.T @ r.eigvecs - torch.eye(k, dtype=f64, device=r.eigvecs.device)).abs().max() < 1e-12
    true = (A @ r.eigvecs.to(device) - r.eigvecs.to(device) * r.eigvals).norm(dim=0).cpu()
    assert (true <= 2 * r.info['residual_norms'] + 1e-13 * scale).all()
    if which == 'LM':
        assert lost(A.eigvecs(k).cpu(), r.eigvecs.cpu()) < LOST.get(kw.get('basis_dtype'), 1e-9) * (
            20 if 'max_basis' in kw else 1
        )


@pytest.mark.parametrize('place', [None, 'files'])
@pytest.mark.parametrize('store', [None, torch.bfloat16])
def test_saved_and_continued_bit_for_bit(place, store, device, tmp_path):
    A, place = SynthOperator(SPECTRA['slow tail, both signs'], seed=7, device=device), place and tmp_path
    s = BlockLanczos(A, 7, seed=1, basis_dtype=store, basis_place=place)
    for _ in range(9):
        s.step()
    s.restart(30)
    s.step()
    s.save(tmp_path / 's.pt')
    t = BlockLanczos.load(tmp_path / 's.pt', A, basis_place=place)
    for _ in range(6):
        s.step()
        t.step()
    assert (
        all(torch.equal(a, b) for a, b in zip(s.ritz(), t.ritz())) and torch.equal(s.Q, t.Q) and s.matvecs == t.matvecs
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ['s.pt']  # neither parts nor files of the basis


def test_a_save_that_is_killed_leaves_the_old_file(tmp_path, monkeypatch):
    A = SynthOperator(SPECTRA['exponential'], seed=7)
    s = BlockLanczos(A, 4, seed=1).step()
    s.save(tmp_path / 's.pt')

    def dies(obj, path):
        path.write_bytes(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', dies)
    with pytest.raises(KeyboardInterrupt):
        s.step().save(tmp_path / 's.pt')
    assert BlockLanczos.load(tmp_path / 's.pt', A).matvecs == 4


@pytest.mark.parametrize('how', ['result', 'state', 'file'])
def test_going_on_repeats_no_product(how, tmp_path):
    lam, calls = SPECTRA['slow tail, both signs'], []
    S = SynthOperator(lam, seed=7)
    mm = lambda V: (calls.append(V.shape[1]), S @ V)[1]
    A = FunctionLinearOperator(mm, S.shape, rmatmat=mm, dtype=f64, device='cpu')
    whole = eigsh(A, 30, seed=0)
    n_whole = sum(calls)
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        part = eigsh(A, 30, max_matvecs=60, seed=0)
    U = part.eigvecs.clone()
    state = part.info['state']
    if how == 'file':
        state.save(tmp_path / 's.pt')
        state = BlockLanczos.load(tmp_path / 's.pt', A)
    r = eigsh(A, 30, start=part if how == 'result' else state, seed=0)
    assert (
        sum(calls) == r.info['matvecs']
        and r.info['resumed'] == 60
        and abs(r.info['matvecs'] - n_whole) <= 30
        and r.info['converged']
    )
    torch.testing.assert_close(r.eigvals, whole.eigvals, rtol=1e-11, atol=1e-13)
    assert torch.equal(part.eigvecs, U)  # the earlier result is still what it was
    further = eigsh(A, 40, start=r, seed=0)  # and the state, which both hold, is whole
    assert (
        lost(S.eigvecs(40), further.eigvecs) < 1e-9
        and further.info['resumed'] == r.info['matvecs']
        and lost(S.eigvecs(30), r.eigvecs) < 1e-9
    )


def test_more_pairs_from_a_kept_state():
    A = SynthOperator(SPECTRA['slow tail, both signs'], seed=7)
    r = eigsh(A, 10, keep_state=True, seed=0)
    more = eigsh(A, 40, start=r, seed=0)
    from_nothing = eigsh(A, 40, seed=0)
    assert more.info['resumed'] == r.info['matvecs'] and more.info['matvecs'] <= from_nothing.info['matvecs'] + 40
    assert lost(A.eigvecs(40), more.eigvecs) < 1e-9
    with pytest.raises(ValueError, match='blocks of 10 needs max_basis of at least k . 60'):
        eigsh(A, 40, start=r, max_basis=60, seed=0)


@pytest.mark.parametrize('j', [1, 5, 10, 60])
def test_start_vectors(j):
    A = SynthOperator(SPECTRA['slow tail, both signs'], seed=7)
    r = eigsh(A, 30, start=A.eigvecs(j), seed=0)
    assert r.info['converged'] and lost(A.eigvecs(30), r.eigvecs) < 1e-9
    assert abs(r.info['start_overlap'] - min(j, 30) / 30) < 1e-9
    for bad, says in ((torch.ones(3, 2), 'start must be'), (A.eigvecs(2) * float('nan'), 'not finite')):
        with pytest.raises(ValueError, match=says):
            eigsh(A, 30, start=bad.double(), seed=0)


def test_orthonormal_at_a_thousand(device):
    lam = synth_eigvals(2500, 'poly', rank=1, decay=0.5, seed=1)
    for dtype, tol in ((torch.float32, 1e-5), (f64, 1e-12)):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', RuntimeWarning)
            U = eigsh(
                SynthOperator(lam, seed=3, dtype=dtype, device=device),
                1000,
                max_matvecs=1200,
                max_basis=1150,
                block_size=50,
                seed=0,
            ).eigvecs
        assert (U.T @ U - torch.eye(1000, dtype=dtype, device=device)).abs().max() < tol


@pytest.mark.parametrize('which', ['LM', 'LA', 'SA', 'BE'])
@pytest.mark.parametrize('tol_overlap', [1e-2, 1e-4])
def test_the_bound_on_the_overlap_holds(lam, which, tol_overlap):
    A = SynthOperator(lam, seed=7)
    k = 25
    E = A.eigvecs(500)
    values = A.eigvals
    top = {
        'LM': torch.arange(k),
        'LA': values.argsort(descending=True)[:k],
        'SA': values.argsort()[:k],
        'BE': torch.cat([values.argsort(descending=True)[: k - k // 2], values.argsort()[: k // 2]]),
    }[which]
    rest = [j for j in range(500) if j not in set(top.tolist())]
    if which == 'LM' and values[k - 1].abs() == values[k].abs():
        pytest.skip('the eigenspace is not defined: a pair is cut')
    if min((values[j] - values[i]).abs() for j in top[-1:] for i in rest) == 0:
        pytest.skip('the eigenspace is not defined: a pair is cut')
    held = 0
    for s in range(2):
        mask = torch.from_numpy(np.random.default_rng(s).permutation(500)[:40])
        i = eigsh(
            A, k, which=which, mask=mask, tol_overlap=tol_overlap, max_matvecs=500, seed=s
        ).info  # at most the whole space
        truth = E[mask][:, top].square().sum().item() / k
        held += abs(i['overlap'] - truth) <= i['overlap_error'] + 1e-10
    assert held == 2


def test_a_mask_in_any_form():
    A = SynthOperator(SPECTRA['exponential'], seed=7)
    idx = torch.tensor([3, 9, 100])
    from hessian_overlap.masks import Mask

    a, b, c = (
        eigsh(A, 5, mask=m, seed=0).info['overlap']
        for m in (idx, torch.zeros(500, dtype=torch.bool).index_fill(0, idx, True), Mask(idx, 500))
    )
    assert a == b == c
    for bad, err in (
        (torch.tensor([1, 1]), ValueError),
        (torch.tensor([500]), ValueError),
        (torch.ones(3), TypeError),
        (torch.zeros(500, dtype=torch.bool), TypeError),
    ):
        with pytest.raises(err):
            eigsh(A, 5, mask=bad, seed=0)


@pytest.mark.parametrize('steps', [1, 4, 12])
def test_quadrature_is_exact_for_moments(lam, steps):
    A = SynthOperator(lam / lam.abs().max(), seed=7)
    s = BlockLanczos(A, 3, seed=2)
    for _ in range(steps):
        s.step()
    nodes, weights = s.quadrature()
    Z = V = column_noise(500, range(3), seed=2)
    for p in range(2 * steps):
        torch.testing.assert_close((nodes[:, None] ** p * weights).sum(0), (Z * V).sum(0) / 500, rtol=1e-10, atol=1e-12)
        V = A @ V


def test_auto_block_counts_its_products():
    A = SynthOperator(SPECTRA['slow tail, both signs'], seed=7)
    calls = []
    mm = lambda V: (calls.append(V.shape[1]), A @ V)[1]
    r = eigsh(FunctionLinearOperator(mm, A.shape, rmatmat=mm, dtype=f64, device='cpu'), 20, block_size='auto', seed=0)
    assert r.info['matvecs'] == sum(calls) and 4 <= r.info['block_size'] <= 64 and lost(A.eigvecs(20), r.eigvecs) < 1e-9


def test_eigenvectors_take_no_second_basis(monkeypatch):
    "The result is a view of the first segment of the basis, as long as it, and nothing else of the basis lives"
    A = SynthOperator(SPECTRA['slow tail, both signs'], seed=7)
    r = eigsh(A, 30, seed=0)
    assert r.eigvecs.untyped_storage().nbytes() == 500 * 30 * 8 and 'state' not in r.info


def test_an_operator_that_fails_late_leaves_a_state_to_go_on_with():
    A = SynthOperator(SPECTRA['slow tail, both signs'], seed=7)
    s = BlockLanczos(A, 5, seed=0)
    for _ in range(6):
        s.step()
    good, before = s.A, (s.size, s.ritz()[0].clone())

    class Down:
        def __matmul__(self, V):
            raise RuntimeError('device lost')

    s.A = Down()
    with pytest.raises(RuntimeError, match='device lost'):
        s.step()
    s.A = good
    assert s.size == before[0] and torch.equal(s.ritz()[0], before[1])
    t = BlockLanczos(A, 5, seed=0)
    for _ in range(8):
        t.step()
    s.step().step()
    assert torch.equal(s.ritz()[0], t.ritz()[0])
