"Optimiser, moving average, checkpoints and the training loop."
import json, math, os, random, resource, signal, subprocess, sys, textwrap, time
from pathlib import Path
import pytest, torch
from torch import nn
from pixart_delta_nb import core, optimisers as optimisers_module, training
from pixart_delta_nb.checkpoints import Checkpoint, pack, read_checkpoint, unpack
from pixart_delta_nb.optimisers import EMA, Muon, adamw, early_decay, optimisers, orthogonalise, warm_constant_decay, warm_up
from pixart_delta_nb.training import tensorboard_log, train


pytestmark = pytest.mark.usefixtures('seeded')


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


def test_fused_adamw_equals_the_plain_loop():
    ends = []
    for make in (lambda p: adamw([{'params': p, 'lr': .02}], .5, betas=(.8, .9), eps=1e-6), lambda p: torch.optim.AdamW(p, .02, betas=(.8, .9), eps=1e-6, weight_decay=0., foreach=False)):
        p, g = nn.Parameter(torch.ones(6, 4)), torch.Generator().manual_seed(1)
        opt = make([p])
        for _ in range(5):
            p.grad = torch.randn(p.shape, generator=g)
            opt.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-7)


def test_moments_in_8_bits_take_a_byte_each_and_resume_bit_for_bit(tmp_path):
    pytest.importorskip('bitsandbytes')
    def go(out, **options):
        torch.manual_seed(0)
        net, generator = nn.Linear(64, 64), torch.Generator().manual_seed(0)
        state = {'net': net, 'adamw': adamw(net.parameters(), 1e-2, eight_bit=True), 'generator': generator}
        train(lambda step, steps: (net(x := torch.randn(4, 64, generator=generator)) - x.flip(1)).square().mean(), state, 6, tmp_path/out, progress=False, **options)
        return net, state['adamw']
    (whole, opt), _ = go('whole'), go('parts', until=3)
    parts, _ = go('parts', resume=True)
    assert {opt.state[whole.weight][k].dtype for k in ('state1', 'state2')} == {torch.uint8}
    assert torch.equal(whole.weight, parts.weight) and torch.equal(whole.bias, parts.bias)


def test_moments_in_8_bits_are_refused_where_they_cannot_be(monkeypatch):
    cut = nn.Parameter(torch.zeros(2, 2)); cut.placements = ()
    monkeypatch.setattr(optimisers_module, 'find_spec', lambda name: True)
    with pytest.raises(ValueError, match='ddp.yaml'): adamw([{'params': [cut]}], .1, eight_bit=True)
    monkeypatch.setattr(optimisers_module, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='pip install .pixart_delta_nb.scale'): adamw([nn.Parameter(torch.zeros(2))], .1, eight_bit=True)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('eight_bit', [False, True])
def test_weights_in_half_precision_are_refused_since_small_steps_round_to_nothing(dtype, eight_bit):
    weight = torch.tensor([.02], dtype=dtype)
    assert dtype == torch.float16 or weight - 2e-5 == weight
    with pytest.raises(ValueError, match='train them in float32'): adamw([nn.Parameter(weight)], 2e-5, eight_bit=eight_bit)


def test_warm_up_is_one_step_ahead_of_the_released_scheduler():
    from diffusers.optimization import get_constant_schedule_with_warmup
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.)
    released, rates = get_constant_schedule_with_warmup(opt, 5), []
    for _ in range(9): rates.append(released.get_last_lr()[0]); opt.step(); released.step()
    assert rates[0] == 0 and rates[1:] == [warm_up(5)(i, 9) for i in range(8)] and warm_up(0)(0, 9) == 1


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
    with pytest.raises(ValueError, match='batch = 4, not 8'): run(tmp_path, resume=True, config={'batch': 8})


def test_a_new_run_does_not_write_over_another_runs_checkpoint(tmp_path):
    run(tmp_path, until=4)
    before = (tmp_path/'checkpoint.safetensors').read_bytes()
    with pytest.raises(ValueError, match='resume=True .* or choose another folder'): run(tmp_path)
    assert (tmp_path/'checkpoint.safetensors').read_bytes() == before


def test_nor_over_one_whose_newest_file_was_lost(tmp_path):
    run(tmp_path, save_every=4)
    (tmp_path/'checkpoint.safetensors').unlink()
    with pytest.raises(ValueError, match='would write over'): run(tmp_path)


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


def terminated(folder):
    "Exit code of a child that trains without end until SIGTERM reaches it from outside."
    reader, writer = os.pipe()
    def job():
        state, step_fn, after = task()
        def told(step, steps):
            if step == 3: os.write(writer, b'x')
            return step_fn(step, steps)
        try: train(told, state, 10**6, folder, after=after, progress=False)
        except SystemExit as stop: os._exit(stop.code)
    child = forked(job)
    os.read(reader, 1)
    os.kill(child, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_sigterm_is_an_interrupt(tmp_path, capfd):
    assert terminated(tmp_path) == 130
    saved = read_checkpoint(tmp_path/'checkpoint.safetensors')['scalars']
    assert 3 < saved['step'] < 10**6 and f"Stopped after step {saved['step']} of" in capfd.readouterr().err


def test_a_long_run_prints_plain_lines_where_no_terminal_is(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(core.PlainProgress, 'EVERY', .05)
    net = nn.Linear(1, 1)
    train(lambda i, n: time.sleep(.02) or net.weight.sum(), {'net': net}, 20, tmp_path, log_every=2)
    said = capfd.readouterr().err.splitlines()
    assert len(said) >= 3 and all(line.startswith('training: ') and ' of 20, ' in line for line in said) and 'loss' in said[-1]


def test_interrupt_handler_is_restored(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def spoil(path, at=-1):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize('damage', ['bit', 'header', 'cut', 'missing', 'empty'])
def test_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(tmp_path, capsys, damage):
    whole, log = run(tmp_path/'whole')
    run(tmp_path, until=10, save_every=4)
    path = tmp_path/'checkpoint.safetensors'
    if damage == 'bit': spoil(path)
    if damage == 'header': spoil(path, path.read_bytes().index(b'scalars') + 3)
    if damage == 'cut': path.write_bytes(path.read_bytes()[:-50])
    if damage == 'missing': path.unlink()
    if damage == 'empty': path.write_bytes(b'')
    parts, log2 = run(tmp_path, seed=1, resume=True, save_every=4)
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'checkpoint.previous.safetensors' in said
    assert same(whole, parts) and log == log2
    assert read_checkpoint(tmp_path/'checkpoint.previous.safetensors')['scalars']['step'] in (12, 16)


def test_flipped_bit_without_a_previous_checkpoint_is_one_sentence(tmp_path):
    run(tmp_path)
    spoil(tmp_path/'checkpoint.safetensors')
    with pytest.raises(ValueError, match='SHA-256'): run(tmp_path, resume=True)


def test_two_checkpoints_are_the_limit(tmp_path):
    run(tmp_path, save_every=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint.previous.safetensors', 'checkpoint.safetensors', 'log.jsonl']


def test_checkpoint_without_checksum_still_loads(tmp_path):
    run(tmp_path, until=5)
    path = tmp_path/'checkpoint.safetensors'
    layout = json.loads(core.load_metadata(path)['json'])
    scalars = next(v for k, v in layout['$items'] if k == 'scalars')
    scalars['$items'] = [i for i in scalars['$items'] if i[0] != 'recent']
    core.save_tensors(path, core.load_tensors(path), {'json': json.dumps(layout)})
    whole, log = run(tmp_path/'whole')
    parts, log2 = run(tmp_path, seed=1, resume=True)
    assert same(whole, parts) and log == log2


def limited_save(folder, limit):
    "Exit code of a child that trains where no file may grow beyond `limit` bytes, as on a full disk."
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try: run(folder, resume=True, save_every=1)
        except OSError as error: os._exit(10 if 'the checkpoint before it is whole' in str(error) and 'free some space' in str(error) else 11)
        finally: os._exit(12)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_full_disk_leaves_the_checkpoint_and_says_so(tmp_path):
    whole, log = run(tmp_path/'whole')
    run(tmp_path, until=6)
    assert limited_save(tmp_path, 2000) == 10
    assert read_checkpoint(tmp_path/'checkpoint.safetensors')['scalars']['step'] == 6
    parts, log2 = run(tmp_path, seed=1, resume=True)
    assert same(whole, parts) and log == log2


def diverge(out, factor, **options):
    state, step_fn, after = task()
    spoilt = lambda step, steps: step_fn(step, steps)*(factor if step == 20 else 1.)
    with pytest.raises(ValueError) as error: train(spoilt, state, 30, out, save_every=7, progress=False, **options)
    return str(error.value), state


@pytest.mark.parametrize('factor', [math.nan, math.inf, 1e5])
def test_divergence_stops_with_a_diagnosis_before_the_update(tmp_path, factor):
    said, state = diverge(tmp_path, factor)
    for word in ('step 20', 'learning rate (now 0.002)', 'group 0 of', 'net.'): assert word in said
    assert all(p.isfinite().all() for p in state['net'].parameters())
    assert read_checkpoint(tmp_path/'checkpoint.safetensors')['scalars']['step'] == 14


def test_explosions_may_be_allowed(tmp_path):
    state, step_fn, after = task()
    log = train(lambda i, n: step_fn(i, n)*(1e5 if i == 20 else 1.), state, 24, tmp_path, explode=0, progress=False)
    assert log[-1]['step'] == 24


def test_a_falling_loss_is_no_explosion(tmp_path):
    net = nn.Linear(1, 1)
    train(lambda i, n: net.weight.sum()*0 + 10.**-i, {'net': net}, 40, tmp_path, progress=False)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    state, step_fn, after = task()
    def ruin(step, steps):
        if step == 9: state['net'][0].bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match='net.0.bias'): train(step_fn, state, 20, tmp_path, after=ruin, save_every=5, progress=False)
    assert read_checkpoint(tmp_path/'checkpoint.safetensors')['scalars']['step'] == 5


def test_gradients_of_batches_add_up(tmp_path):
    x, weights = torch.randn(12, 5), []
    for k in (1, 3):
        torch.manual_seed(0)
        net, at = nn.Linear(5, 1).double(), iter(range(100))
        step_fn = lambda i, n: net(x.double().chunk(k)[next(at) % k]).square().mean()
        log = train(step_fn, {'net': net, 'sgd': torch.optim.SGD(net.parameters(), .1)}, 4, tmp_path/str(k), accumulate=k, progress=False)
        weights.append(torch.cat([net.weight.detach().flatten(), torch.tensor([log[-1]['loss']])]))
    assert torch.allclose(*weights, atol=1e-12)
    with pytest.raises(ValueError, match='accumulate is 0'): train(step_fn, {}, 4, tmp_path, accumulate=0)


def test_tensorboard_or_one_sentence(tmp_path):
    try: import tensorboard
    except ImportError:
        with pytest.raises(ValueError, match='pip install tensorboard'): tensorboard_log(tmp_path)
        return
    run(tmp_path/'run', log=tensorboard_log(tmp_path/'board'))
    assert any((tmp_path/'board').iterdir())


def stop_inside(moment, count):
    "Kill this process at the `count`-th save: half-way through the file, before, between or after its renames."
    calls, save_file, replace = iter(range(1, 10**6)), core.save_file, os.replace
    def die(): os.kill(os.getpid(), signal.SIGKILL)
    def half(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if moment == 'half' and next(calls) == count: os.truncate(path, os.path.getsize(path)//2); die()
    def renames(a, b):
        hit = Path(b).name == {'before': 'checkpoint.new.safetensors', 'between': 'checkpoint.safetensors', 'after': 'log.jsonl'}.get(moment) and next(calls) == count
        if hit: die()
        replace(a, b)
    core.save_file, os.replace = half, renames


def forked(job):
    "Run `job` in a child; its process id."
    child = os.fork()
    if child: return child
    try: job()
    except BaseException as error: print(repr(error), file=sys.stderr); os._exit(1)
    os._exit(0)


def kill_moments(folder):
    "Twenty runs, each killed once at a random moment and resumed: the number killed, and the number that did not end as the whole run."
    job = lambda out, **options: lambda: run(out, save_every=1, **options)
    wait = lambda child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    run(folder/'warm') # what torch imports at its first step is imported once, before the forks
    start = time.perf_counter()
    assert wait(forked(job(folder/'whole'))) == 0
    seconds, rng, killed, wrong = time.perf_counter() - start, random.Random(0), 0, []
    whole = read_checkpoint(folder/'whole/checkpoint.safetensors')
    inside = [(m, rng.randint(2, 15)) for m in ('half', 'half', 'before', 'between', 'between', 'after')]
    for i in range(60):
        out = folder/str(i)
        if i < 6: child = forked(lambda: (stop_inside(*inside[i]), job(out)()))
        else:
            child = forked(job(out))
            time.sleep(rng.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        if wait(child) == -signal.SIGKILL: killed += 1
        else: seconds *= .8 # it was faster than the first
        assert wait(forked(job(out, seed=1, resume=True) if training.Checkpoint(out/'checkpoint.safetensors').exists() else job(out))) == 0
        a, b = {}, {}
        parts = read_checkpoint(out/'checkpoint.safetensors')
        equal = pack(parts, a) == pack(whole, b) and all(torch.equal(a[k], b[k]) for k in b) and (out/'log.jsonl').read_text() == (folder/'whole/log.jsonl').read_text()
        tidy = {p.name for p in out.glob('*')} == {'checkpoint.safetensors', 'checkpoint.previous.safetensors', 'log.jsonl'}
        if not (equal and tidy): wrong.append(i)
        if killed == 20: break
    print(json.dumps({'killed': killed, 'wrong': wrong}))


def test_killed_at_twenty_random_moments_ends_bit_for_bit_the_same(tmp_path):
    code = 'import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import torch; torch.set_num_threads(1); import test_training; test_training.kill_moments(Path(sys.argv[1]))'
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path), os.path.dirname(__file__)], capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found == {'killed': 20, 'wrong': []}


def test_what_a_kill_left_half_written_is_cleared_by_the_next_checkpoint(tmp_path):
    for name in ('.checkpoint.new.1a2b', '.tmpKhLRgs'): (tmp_path/name).write_bytes(b'half')
    training.Checkpoint(tmp_path/'checkpoint.safetensors').save({}, step=1)
    assert [p.name for p in tmp_path.iterdir()] == ['checkpoint.safetensors']
