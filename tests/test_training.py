"Optimiser, moving average, checkpoints and the training loop."
import math, os, signal, subprocess, sys, textwrap
import pytest, torch
from torch import nn
from pixart_delta_nb.training import EMA, Checkpoint, Muon, early_decay, optimisers, orthogonalise, pack, train, unpack, warm_constant_decay


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def task(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(.2), nn.SiLU(), nn.Linear(8, 2))
    generator, ema = torch.Generator().manual_seed(seed), EMA(net)
    state = {'net': net, 'ema': ema, 'generator': generator} | optimisers(net, lambda n, p: p.ndim == 2)
    step_fn = lambda step, steps: (net(x := torch.randn(4, 5, generator=generator)) - x[:, :2]).square().mean()
    return state, step_fn, lambda step, steps: ema.update(net, early_decay(.9, step))


def run(out, seed=0, steps=16, **options):
    state, step_fn, after = task(seed)
    log = train(step_fn, state, steps, out, schedule=warm_constant_decay(3, .5), clip=1., after=after, log_every=3, progress=False, **options)
    return state, log


def same(a, b):
    return all(torch.equal(x, y) for n in ('net', 'ema') for x, y in zip(a[n].state_dict().values(), b[n].state_dict().values()))


def test_orthogonalise_acts_on_singular_values_only():
    g = torch.randn(9, 6, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    s = s/s.norm()
    for _ in range(5): s = 3.4445*s - 4.7750*s**3 + 2.0315*s**5
    assert torch.allclose(orthogonalise(g), u @ torch.diag(s) @ vh, atol=1e-5)


def test_muon_equals_torch_within_bfloat16():
    steps = []
    for make in (lambda p: Muon(p, lr=.01), lambda p: torch.optim.Muon(p, lr=.01, weight_decay=0., momentum=.95, adjust_lr_fn='match_rms_adamw')):
        p = nn.Parameter(torch.zeros(24, 40))
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        make([p]).step()
        steps.append(p.detach())
    assert (steps[0] - steps[1]).norm() < .02*steps[1].norm()


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match='AdamW'): Muon([nn.Parameter(torch.zeros(3))])


def test_muon_skips_parameters_without_gradient():
    p = nn.Parameter(torch.ones(2, 2))
    Muon([p]).step()
    assert torch.equal(p.detach(), torch.ones(2, 2))


def test_schedule_of_the_drafts():
    f = warm_constant_decay(100, .4, .01)
    for i in range(0, 5000, 37):
        x = i/5000
        assert f(i, 5000) == min(1, i/100)*(1 if x < .4 else max(.01, (1 - x)/.6))


def test_ema_is_a_geometric_series():
    net = nn.Linear(2, 2)
    ema, start = EMA(net), net.weight.detach().clone()
    with torch.no_grad(): net.weight += 1
    for _ in range(5): ema.update(net, .8)
    assert torch.allclose(ema.module.weight, start + 1 - .8**5, atol=1e-6)


def test_pack_round_trip_keeps_floats_and_integer_keys():
    tensors, value = {}, {3: [1/3, None, 'x', {'t': torch.arange(3)}]}
    back = unpack(pack(value, tensors), tensors)
    assert back[3][:3] == value[3][:3] and torch.equal(back[3][3]['t'], torch.arange(3))


def test_checkpoint_contains_no_pickle(tmp_path):
    run(tmp_path)
    from safetensors.torch import load_file
    assert load_file(tmp_path/'checkpoint.safetensors') and sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint.safetensors', 'log.jsonl']


def test_damaged_checkpoint_is_one_sentence(tmp_path):
    run(tmp_path)
    path = tmp_path/'checkpoint.safetensors'
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match='checkpoint.safetensors'): run(tmp_path, resume=True)


@pytest.mark.parametrize('pause', [1, 8, 15])
def test_resume_is_bit_exact(tmp_path, pause):
    whole, log = run(tmp_path/'a')
    run(tmp_path/'b', until=pause)
    parts, log2 = run(tmp_path/'b', seed=1, resume=True)
    assert same(whole, parts) and log == log2


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    whole, log = run(tmp_path)
    again, log2 = run(tmp_path, seed=1, resume=True)
    assert same(whole, again) and log == log2


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, until=4)
    def fail(*a, **k): raise OSError('disk full')
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError): run(tmp_path, resume=True)
    assert Checkpoint(tmp_path/'checkpoint.safetensors').read()['scalars']['step'] == 4


def test_another_number_of_steps_is_refused(tmp_path):
    run(tmp_path, until=4)
    with pytest.raises(ValueError, match='run of 16 steps'): run(tmp_path, steps=20, resume=True)


def test_other_settings_are_refused(tmp_path):
    run(tmp_path, until=4, config={'batch': 4})
    with pytest.raises(ValueError, match='batch'): run(tmp_path, resume=True, config={'batch': 8})


def test_loss_must_be_finite(tmp_path):
    with pytest.raises(ValueError, match='finite'):
        train(lambda step, steps: nn.Linear(1, 1)(torch.tensor([math.inf])).sum(), {}, 2, tmp_path, progress=False)


def test_interrupt_checkpoints_and_exits_with_130(tmp_path):
    code = textwrap.dedent('''
        import signal, sys; sys.path.insert(0, sys.argv[2])
        from test_training import task, train, warm_constant_decay
        state, step_fn, after = task()
        def press(step, steps):
            if step == 5: signal.raise_signal(signal.SIGINT)
            return step_fn(step, steps)
        train(press, state, 16, sys.argv[1], schedule=warm_constant_decay(3, .5), clip=1., after=after, log_every=3, progress=False)''')
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path), os.path.dirname(__file__)], capture_output=True, text=True,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 130 and done.stderr.startswith('Stopped after step 6 of 16') and 'Traceback' not in done.stderr
    whole, log = run(tmp_path/'whole')
    parts, log2 = run(tmp_path, seed=1, resume=True)
    assert same(whole, parts) and log == log2


def test_interrupt_handler_is_restored(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
