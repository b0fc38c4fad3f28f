"Laws of the Hessian operator: one table of models, losses and data, every law over all of them"
import copy, pytest, torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, TensorDataset
from hessian_overlap.curvature import HessianLinearOperator
from hessian_overlap.problems import mnist_mlp
from hessian_overlap.synthmat import column_noise

DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
f64 = torch.float64

class Tied(nn.Module):
    "The same weight used twice"
    def __init__(self): super().__init__(); self.a = nn.Linear(4, 4, bias=False); self.b = nn.Linear(4, 4, bias=False); self.b.weight = self.a.weight
    def forward(self, x): return self.b(torch.tanh(self.a(x)))

class Recurrent(nn.Module):
    def __init__(self): super().__init__(); self.rnn = nn.LSTM(2, 3, batch_first=True); self.head = nn.Linear(3, 3)
    def forward(self, x): return self.head(self.rnn(x)[0][:, -1])

class Square(torch.autograd.Function):
    "A user's own differentiable function, without a vmap rule"
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x*x
    @staticmethod
    def backward(ctx, g): return 2*ctx.saved_tensors[0]*g

class Custom(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(6, 3)
    def forward(self, x): return Square.apply(self.a(x))

mlp = lambda *sizes, act=nn.Tanh: nn.Sequential(*[m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), act())][:-1])
classes = lambda N, C: (lambda g: torch.randint(0, C, (N,), generator=g))
values = lambda *s: (lambda g: torch.randn(*s, generator=g, dtype=f64))

CASES = { # name: (model, loss, x shape, y)
    'mlp, cross-entropy': (lambda: mlp(6, 5, 3), nn.CrossEntropyLoss(), (11, 6), classes(11, 3)),
    'mlp, cross-entropy, sum': (lambda: mlp(6, 5, 3), nn.CrossEntropyLoss(reduction='sum'), (11, 6), classes(11, 3)),
    'mlp, class weights': (lambda: mlp(6, 5, 3), nn.CrossEntropyLoss(weight=torch.tensor([1., 5., .2], dtype=f64)), (11, 6), classes(11, 3)),
    'mlp, ignore_index': (lambda: mlp(6, 5, 3), nn.CrossEntropyLoss(ignore_index=1), (11, 6), classes(11, 3)),
    'mlp, label smoothing': (lambda: mlp(6, 5, 3), nn.CrossEntropyLoss(label_smoothing=.1), (11, 6), classes(11, 3)),
    'relu, mse': (lambda: mlp(6, 5, 2, act=nn.ReLU), nn.MSELoss(), (11, 6), values(11, 2)),
    'gelu, huber': (lambda: mlp(6, 5, 2, act=nn.GELU), nn.HuberLoss(), (11, 6), values(11, 2)),
    'mlp, bce': (lambda: mlp(6, 5, 1), nn.BCEWithLogitsLoss(), (11, 6), lambda g: torch.randint(0, 2, (11, 1), generator=g).to(f64)),
    'own loss function': (lambda: mlp(6, 5, 1), lambda out, y: (out - y).abs().pow(3).mean(), (11, 6), values(11, 1)),
    'own autograd.Function': (Custom, nn.MSELoss(), (11, 6), values(11, 3)),
    'linear, mse': (lambda: nn.Linear(6, 2), nn.MSELoss(), (11, 6), values(11, 2)),
    'conv, pool': (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)), nn.CrossEntropyLoss(), (11, 1, 6, 6), classes(11, 3)),
    'batch norm in eval mode': (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).eval(), nn.CrossEntropyLoss(), (11, 6), classes(11, 3)),
    'layer norm, dropout in eval mode': (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Dropout(.5), nn.Tanh(), nn.Linear(5, 3)).eval(), nn.CrossEntropyLoss(), (11, 6), classes(11, 3)),
    'tied weights': (Tied, nn.MSELoss(), (11, 4), values(11, 4)),
    'lstm': (Recurrent, nn.CrossEntropyLoss(), (11, 4, 2), classes(11, 3)),
}

@pytest.fixture(params=CASES)
def name(request): return request.param
@pytest.fixture(params=DEVICES)
def device(request): return request.param

def make(name, device='cpu', dtype=f64):
    build, loss, shape, target = CASES[name]
    model, g = build(), torch.Generator().manual_seed(0)
    for p in model.parameters(): p.data = torch.randn(p.shape, generator=g, dtype=f64).mul_(.7).to(dtype)
    for b in model.buffers(): b.data = b.data.to(dtype) if b.is_floating_point() else b.data
    x, y = torch.randn(shape, generator=g, dtype=f64).to(dtype), target(g)
    y = y.to(dtype) if y.is_floating_point() else y
    loss = copy.deepcopy(loss)
    if isinstance(loss, nn.Module): loss = loss.to(dtype)
    to = lambda o: o.to(device) if hasattr(o, 'to') else o
    return to(model), to(loss), to(x), to(y)

def dense(model, loss, x, y):
    "The Hessian by torch.func, independent of the operator"
    named = dict(model.named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    def f(t):
        parts = {k: c.reshape(p.shape) for (k, p), c in zip(named.items(), t.split([p.numel() for p in named.values()]))}
        return loss(functional_call(model, parts, (x,)), y)
    rows = []
    t = flat.clone().requires_grad_()
    g = torch.autograd.grad(f(t), t, create_graph=True)[0]
    for gi in g: rows.append(torch.autograd.grad(gi, t, retain_graph=True, materialize_grads=True, allow_unused=True)[0])
    return torch.stack(rows).detach(), g.detach()

def eye(H): return torch.eye(H.shape[0], dtype=H.dtype, device=H.device)

def test_equals_the_dense_hessian(name, device):
    model, loss, x, y = make(name, device)
    H = HessianLinearOperator(model, loss, list(model.parameters()), [(x, y)])
    D, g = dense(model, loss, x, y)
    scale = D.abs().max()
    torch.testing.assert_close((H @ eye(H))/scale, D/scale, rtol=0, atol=1e-10)
    torch.testing.assert_close(H.gradient, g, rtol=1e-10, atol=1e-12)
    assert H.T is H and abs(H.loss - loss(model(x), y).item()) < 1e-12

def test_equals_finite_differences(name):
    "An oracle that differentiates once only: central differences of the gradient, error O(ε²)"
    model, loss, x, y = make(name)
    H = HessianLinearOperator(model, loss, None, [(x, y)])
    v = column_noise(H.shape[0], [0], seed=3)[:, 0]
    def g(t): return HessianLinearOperator(nn.utils.vector_to_parameters(t, list(model.parameters())) or model, loss, None, [(x, y)], check_deterministic=False).gradient
    theta = H.theta.clone()
    fd = (g(theta + 1e-5*v) - g(theta - 1e-5*v))/2e-5
    assert (H @ v - fd).norm() <= 2e-6*fd.norm() + 1e-8

def test_symmetric_and_linear(name, device):
    model, loss, x, y = make(name, device)
    H = HessianLinearOperator(model, loss, None, [(x, y)])
    V = column_noise(H.shape[0], range(4), seed=0, kind='gauss', device=device)
    HV = H @ V
    scale = HV.norm(dim=0).max()*V.norm(dim=0).max()
    torch.testing.assert_close((V.T @ HV)/scale, (HV.T @ V)/scale, rtol=0, atol=1e-12)
    torch.testing.assert_close(H @ (V[:, 0] - 3*V[:, 1]), HV[:, 0] - 3*HV[:, 1], rtol=1e-9, atol=1e-11*scale.item())

@pytest.mark.parametrize('chunk', [1, 3, 64])
@pytest.mark.parametrize('split', [[11], [4, 7], [10, 1], [1, 3, 7]])
def test_same_for_any_chunk_and_split(name, device, chunk, split):
    model, loss, x, y = make(name, device)
    whole = HessianLinearOperator(model, loss, None, [(x, y)])
    data = list(zip(x.split(split), y.split(split)))
    if not isinstance(loss, nn.Module) or all(torch.isfinite(loss(model(a), b)) for a, b in data): # a batch with nothing but ignored targets has no mean
        V = column_noise(whole.shape[0], range(7), seed=1, device=device)
        ref = whole @ V
        for d in (data, data[::-1]):
            H = HessianLinearOperator(model, loss, None, d, chunk_size=chunk)
            torch.testing.assert_close(H @ V, ref, rtol=1e-9, atol=1e-10*ref.abs().max().item())
            assert abs(H.loss - whole.loss) < 1e-10*max(1, abs(whole.loss))
            torch.testing.assert_close(torch.stack([H @ v for v in V.T], 1), ref, rtol=1e-9, atol=1e-10*ref.abs().max().item())

def test_float32(name, device):
    V = column_noise(HessianLinearOperator(*make(name)[:2], None, [make(name)[2:]]).shape[0], range(3), seed=1)
    out = []
    for dtype in (torch.float64, torch.float32):
        model, loss, x, y = make(name, device, dtype)
        out.append((HessianLinearOperator(model, loss, None, [(x, y)]) @ V.to(device, dtype)).double())
    assert (out[0] - out[1]).norm() <= 1e-5*out[0].norm()

def test_subset_is_a_block(name):
    model, loss, x, y = make(name)
    D, _ = dense(model, loss, x, y)
    named = list(model.named_parameters())
    start = sum(p.numel() for _, p in named[:-1])
    for params in ([named[-1][1]], {named[-1][0]: named[-1][1]}):
        H = HessianLinearOperator(model, loss, params, [(x, y)])
        torch.testing.assert_close(H @ eye(H), D[start:, start:], rtol=1e-9, atol=1e-10*D.abs().max().item())
    for _, p in named[:-1]: p.requires_grad_(False)
    H = HessianLinearOperator(model, loss, None, [(x, y)])
    torch.testing.assert_close(H @ eye(H), D[start:, start:], rtol=1e-9, atol=1e-10*D.abs().max().item())

def test_order_of_params_is_the_order_of_rows():
    model, loss, x, y = make('mlp, cross-entropy')
    ps = list(model.parameters())
    perm = torch.cat([torch.arange(sum(p.numel() for p in ps[:i]), sum(p.numel() for p in ps[:i+1])) for i in (2, 0, 3, 1)])
    A, B = HessianLinearOperator(model, loss, ps, [(x, y)]), HessianLinearOperator(model, loss, [ps[i] for i in (2, 0, 3, 1)], [(x, y)])
    torch.testing.assert_close(B @ eye(B), (A @ eye(A))[perm][:, perm])
    assert torch.equal(A.theta, nn.utils.parameters_to_vector(ps))

def test_keeps_its_parameters_and_leaves_the_model_alone():
    model, loss, x, y = make('batch norm in eval mode')
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    H = HessianLinearOperator(model, loss, None, [(x, y)])
    V = eye(H); before = H @ V
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values())) and all(p.grad is None for p in model.parameters())
    assert torch.equal(rng, torch.get_rng_state())
    with torch.no_grad():
        for p in model.parameters(): p.add_(1)
    for data in ([(x, y)], [(x[:5], y[:5]), (x[5:], y[5:])]):
        torch.testing.assert_close(H @ V, before)
    two = HessianLinearOperator(*make('batch norm in eval mode')[:2], None, data)
    torch.testing.assert_close(two @ V, before)
    with torch.no_grad(): torch.testing.assert_close(H @ V, before)

def test_agrees_with_curvlinops(name):
    curvlinops = pytest.importorskip('curvlinops')
    if name.startswith('layer norm'): pytest.skip('curvlinops 3.0.1 differs from finite differences of the gradient here; ours do not')
    if name in ('own loss function', 'own autograd.Function', 'lstm', 'tied weights', 'mlp, class weights', 'mlp, ignore_index', 'gelu, huber', 'mlp, label smoothing'):
        pytest.skip('curvlinops does not take this case')
    model, loss, x, y = make(name)
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    H = HessianLinearOperator(model, loss, None, data)
    C = curvlinops.HessianLinearOperator(model, loss, list(model.parameters()), data)
    V = column_noise(H.shape[0], range(5), seed=3)
    torch.testing.assert_close(H @ V, C @ V, rtol=1e-9, atol=1e-11*(H @ V).abs().max().item())

def test_the_paper_network_has_7030_parameters():
    x, y = torch.rand(30, 256, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 10
    H = HessianLinearOperator(mnist_mlp(seed=0), nn.CrossEntropyLoss(), None, [(x, y)])
    assert H.shape == (7030, 7030)

class Augmented(Dataset):
    "A loader that never gives the same thing twice"
    def __init__(self): self.calls = 0
    def __len__(self): return 8
    def __getitem__(self, i): self.calls += 1; return torch.full((6,), self.calls/10., dtype=f64), 0

class Noisy(nn.Module):
    def __init__(self): super().__init__(); self.a = nn.Linear(6, 3)
    def forward(self, x): return self.a(x) + torch.rand(3)

def _faults():
    model, loss, x, y = make('mlp, cross-entropy')
    op = lambda model=model, loss=loss, params=None, data=[(x, y)], **kw: HessianLinearOperator(model, loss, params, data, **kw)
    shuffle = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    frozen = copy.deepcopy(model).requires_grad_(False)
    drop = nn.Sequential(nn.Linear(6, 5), nn.Dropout(.1), nn.Linear(5, 3)).double()
    bn = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    lstm = Recurrent(); lstm.rnn = nn.LSTM(2, 3, num_layers=2, dropout=.2, batch_first=True)
    return {
        'shuffling loader': (lambda: op(data=shuffle), ValueError, 'shuffles'),
        'augmenting loader': (lambda: op(data=DataLoader(Augmented(), batch_size=4)), ValueError, 'shuffles or augments'),
        'random model': (lambda: op(model=Noisy().double()), ValueError, 'draws random numbers'),
        'dropout': (lambda: op(model=drop.train()), ValueError, 'Dropout.*training mode'),
        'batch norm': (lambda: op(model=bn.train()), ValueError, 'BatchNorm1d.*training mode'),
        'lstm dropout': (lambda: op(model=lstm.train()), ValueError, 'LSTM.*training mode'),
        'empty': (lambda: op(data=[]), ValueError, 'empty'),
        'used-up generator': (lambda: op(data=(b for b in [(x, y)])), ValueError, '1 batches, then 0|empty'),
        'not pairs': (lambda: op(data=[x]), TypeError, r'batches \(x, y\)'),
        'nan data': (lambda: op(data=[(x, y), (x*float('nan'), y)]), FloatingPointError, 'batch 1'),
        'wrong dtype': (lambda: op(data=[(x.float(), y)]), TypeError, 'cast'),
        'no reduction': (lambda: op(loss=nn.CrossEntropyLoss(reduction='none')), ValueError, 'scalar'),
        'frozen': (lambda: op(model=frozen), ValueError, 'frozen'),
        'no params': (lambda: op(params=[]), ValueError, 'empty'),
        'foreign params': (lambda: op(params=[torch.ones(3)]), ValueError, 'no parameter'),
        'twice': (lambda: op(params=[model[0].weight]*2), ValueError, 'twice'),
        'chunk': (lambda: op(chunk_size=0), ValueError, 'at least 1'),
        'no module': (lambda: op(model=lambda x: x), TypeError, 'Module'),
    }

@pytest.mark.parametrize('fault', _faults())
def test_refuses_by_name(fault):
    call, error, says = _faults()[fault]
    with pytest.raises(error, match=says): call()

def test_fixed_order_loader_is_accepted():
    model, loss, x, y = make('mlp, cross-entropy')
    A = HessianLinearOperator(model, loss, None, DataLoader(TensorDataset(x, y), batch_size=4))
    B = HessianLinearOperator(model, loss, None, [(x, y)])
    torch.testing.assert_close(A @ eye(A), B @ eye(B), rtol=1e-10, atol=1e-12)
