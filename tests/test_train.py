import errno
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import data
import model
from conftest import ROOT, SMALL, ends, script, write_lerobot
from hub import Hub, READER, TOKEN


def entries(out):
    lines = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    return [e for e in lines if 'loss' in e], [e for e in lines if 'val' in e]


def test_what_a_run_leaves_behind(trained):
    """The contract that other programs read."""
    assert {p.name for p in trained.iterdir()} >= {'ckpt.safetensors', 'log.jsonl', 'optim.pt'}
    assert not list(trained.glob('*.new')) + list(trained.glob('*.tmp'))
    steps, vals = entries(trained)
    assert {'step', 'loss', 'flow', 'bootstrap', 'tau', 'lr', 'tokens_per_s', 'mfu', 'memory_gb'} <= set(steps[-1])
    assert steps[-1]['step'] == vals[-1]['step'] == 20 and math.isfinite(steps[-1]['loss'])
    val = vals[-1]['val']
    assert set(val['labelled']) == {'model', 'repeat', 'shuffled', 'hidden'}
    assert set(val['unlabelled']) == {'model', 'repeat'}
    assert val['labelled']['shuffled'] != val['labelled']['model'] != val['labelled']['hidden']
    for errors in (*val['labelled'].values(), *val['unlabelled'].values()):
        assert list(errors) == ['1', '5', '10', '20'] and all(v > 0 for v in errors.values())
    with safetensors.safe_open(trained / 'ckpt.safetensors', 'pt') as f:
        config, keys = json.loads(f.metadata()['config']), set(f.keys())
        assert {'versions', 'step'} <= f.metadata().keys()
    assert config['max_steps'] == 20 and config['dtype'] == 'float32' and config['soft_cap'] == 50.0
    assert {'stats.z_mean', 'stats.z_std', 'stats.a_mean', 'stats.a_std', 'stats.encoder.basis'} <= keys
    assert {k[4:] for k in keys if k.startswith('ema.')} == {k for k in keys if not k.startswith(('ema.', 'stats.'))}
    net, _ = model.load(trained / 'ckpt.safetensors')
    plain, _ = model.load(trained / 'ckpt.safetensors', ema=False)
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters())), 'the average lags behind'


def test_one_of_the_latents_units_is_the_variance_of_the_data(demo, tmp_path):
    for whiten in (0.0, 0.3, 1.0):
        g = script('train.py', *demo, *SMALL, '--max_steps=1', f'--whiten={whiten}',
                   f'--out_dir={tmp_path / str(whiten)}')
        z = torch.from_numpy(np.concatenate([z['z'] for z in g['clips'].tokens.values()]))
        z = (z.float() - g['stats']['z_mean']) / g['stats']['z_std']
        variance = z.flatten(0, 1).var(0)
        assert abs(variance.mean() - 1) < 0.1
        assert (variance.max() / variance.min() < 1.5) == (whiten == 1.0)


def test_channels_are_the_leading_principal_components(demo, tmp_path, capsys):
    g = script('train.py', *demo, *SMALL, '--max_steps=2', '--channels=5', '--eval_interval=1', f'--out_dir={tmp_path}')
    stats = g['stats']
    tokens = torch.from_numpy(np.concatenate([z['z'] for z in g['clips'].tokens.values()])).float()   # (n, N, width)
    basis, z = stats['z_basis'], model.standard(tokens, stats)
    assert basis.shape == (tokens.shape[-1], 5) and torch.allclose(basis.T @ basis, torch.eye(5), atol=1e-5)
    assert g['model'].config['dim'] == 5 and abs(z.flatten(0, 1).var(0).mean() - 1) < 0.1
    flat = tokens.flatten(0, 1).double().numpy()
    values = np.linalg.eigvalsh(np.cov(flat.T))[::-1]
    kept = model.unstandard(z, stats).flatten(0, 1).double().numpy()
    lost = np.square(flat - kept).sum(axis=1).mean()
    assert lost == pytest.approx(values[5:].sum(), rel=0.2), 'no five directions lose less'
    held = float(capsys.readouterr().out.split(' principal components hold ')[1].split('%')[0])
    assert held == pytest.approx(100 * values[:5].sum() / values.sum(), abs=2)
    ckpt = f'--ckpt={tmp_path}/ckpt.safetensors'
    script('decode.py', ckpt, '--rows=1', '--steps=2', '--K=1')
    script('plan.py', ckpt, '--episodes=2', '--budget=2', '--samples=4', '--elites=2', '--iterations=1')
    resumed = script('train.py', *demo, *SMALL, '--max_steps=3', '--channels=5', '--resume=True',
                     f'--out_dir={tmp_path}')
    assert torch.equal(resumed['stats']['z_basis'], basis)
    assert '--channels: 0 cannot go on' in ends('train.py', *demo, *SMALL, '--max_steps=4', '--resume=True',
                                                f'--out_dir={tmp_path}')
    assert '--channels=999: pixels has' in ends('train.py', *demo, *SMALL, '--channels=999', f'--out_dir={tmp_path}/o')


def test_frames_that_are_all_alike_are_a_clear_end(tmp_path):
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    write_lerobot(tmp_path / 'black', [{'observation.images.top': frames, 'action': np.eye(4, 2), 'task': ''}] * 4, 10)
    line = ends('train.py', f'--labelled={tmp_path}/black', '--unlabelled=', *SMALL, '--val_share=0.5', '--max_steps=1', f'--out_dir={tmp_path}/o')
    assert line.startswith('all frames look alike to pixels')


def test_a_learned_projection_keeps_what_the_components_do(demo, tmp_path, capsys):
    given = *demo, *SMALL, '--channels=5', '--project=learned', '--max_steps=2', f'--out_dir={tmp_path}'
    g = script('train.py', *given)
    stats = g['stats']
    components, mine = (float(text.split('%')[0]) for text in capsys.readouterr().out.split(' hold')[1:3] for text in [text.lstrip('s ')])
    assert components - 3 < mine <= components + 1 and mine > 50
    tokens = torch.from_numpy(np.concatenate([z['z'] for z in g['clips'].tokens.values()])).float()   # (n, N, width)
    z = model.standard(tokens, stats)
    lost = (model.unstandard(z, stats) - tokens).square().mean() / (tokens - tokens.mean(dim=(0, 1))).square().mean()
    assert 100 * (1 - lost.item()) == pytest.approx(mine, abs=4) and abs(z.flatten(0, 1).var(0).mean() - 1) < 0.1
    ckpt = f'--ckpt={tmp_path}/ckpt.safetensors'
    script('decode.py', ckpt, '--rows=1', '--steps=2', '--K=1')
    script('plan.py', ckpt, '--episodes=2', '--budget=2', '--samples=4', '--elites=2', '--iterations=1')
    again = script('train.py', *given, '--max_steps=3', '--resume=True')
    assert all(torch.equal(again['stats'][name], stats[name]) for name in ('z_basis', 'z_back'))
    assert "--project: 'pca' cannot go on" in ends('train.py', *given, '--project=pca', '--max_steps=4', '--resume=True')


@pytest.mark.parametrize('how', ['infonce', 'regress'])
def test_aligned_latents_tell_the_state(how, demo, tmp_path, monkeypatch):
    """Better than components do; imagined ones are asked too, of what follows; the same bits after a restart."""
    options = (*demo, *SMALL, '--channels=2', '--project=learned', f'--probe={data.ENVIRONMENT}', '--self_forcing=1', '--seed=3',
               '--val_share=0.5', f'--align={how}', '--grow=0.5')
    save = model.save

    def keep(path, *rest):
        if os.path.isfile(tmp_path / 'b/optim.pt') and not (tmp_path / 'a').exists():
            shutil.copytree(tmp_path / 'b', tmp_path / 'a')
        save(path, *rest)
    monkeypatch.setattr(model, 'save', keep)
    options += '--max_steps=4', '--save_interval=2'
    g = script('train.py', *options, f'--out_dir={tmp_path}/b')
    monkeypatch.setattr(model, 'save', save)
    net, _ = model.load(tmp_path / 'b/ckpt.safetensors')
    reader = model.restore_probe(net.stats, 'align.')
    assert reader.linear and not any(p.requires_grad for p in reader.parameters())
    batch = g['clips'].some(1, 200, 'labelled', g['clips'].val)
    z = model.standard(g['raw_latents'](batch), net.stats)[:, 0]
    code = reader.code(batch['p'][:, 0])
    off = (reader(z) - code).square().mean()
    assert off < 0.5 * code.square().mean(), 'held out'
    terms = [json.loads(line) for line in (tmp_path / 'b/log.jsonl').read_text().splitlines()]
    told = [e['align'] for e in terms if 'align' in e]
    assert told and min(told) > 0 and abs(told[0] - off) > 0.01 * off, 'of imagined frames'
    again = script('train.py', *options, '--resume=True', f'--out_dir={tmp_path}/a')
    others = script('train.py', *options, '--align_dynamics=0', f'--out_dir={tmp_path}/c')
    weights = [safetensors.torch.load_file(tmp_path / name / 'ckpt.safetensors') for name in 'abc']
    assert [k for k in weights[1] if not torch.equal(weights[0][k], weights[1][k])] == []
    assert torch.equal(weights[2]['stats.z_basis'], weights[1]['stats.z_basis']) and 'align.token.weight' in net.stats
    assert not torch.equal(weights[2]['layers.0.attn.qkv.weight'], weights[1]['layers.0.attn.qkv.weight'])
    assert again['clips'].probed and not others['clips'].probed
    for other in ['--resume=True', f'--out_dir={tmp_path}/a'], [f'--init={tmp_path}/b/ckpt.safetensors', f'--out_dir={tmp_path}/d']:
        line = ends('train.py', *options, '--max_steps=6', f'--probe={data.ENVIRONMENT}.tip_x', *other)
        assert line.startswith(f'--probe={data.ENVIRONMENT}.tip_x: ') and f'was aligned to {data.ENVIRONMENT}.tip_x,{data.ENVIRONMENT}.' in line
    assert not (tmp_path / 'd').exists()
    tuned = script('train.py', *[o for o in options if '--probe' not in o], '--align_dynamics=0', '--max_steps=1',
                   f'--init={tmp_path}/b/ckpt.safetensors', f'--out_dir={tmp_path}/d')
    assert tuned['aligned'] and not tuned['clips'].probed, 'on data without these numbers'


def test_guessed_clips_of_no_weight_teach_the_model_nothing(demo, tmp_path):
    """Where all are guessed, from the middle of what the world model learns: neither by one step nor by imagining more."""
    options = *demo, *SMALL, '--max_steps=8', '--frames=4', '--labelled_share=0', '--policy=True', '--relabel=1', '--relabel_weight=0', '--weight_decay=0'
    options = *options, '--dream=0.5', '--dream_steps=0', '--log_interval=1', '--eval_interval=9'
    script('train.py', *options, '--self_forcing=0.5', f'--out_dir={tmp_path}/a')
    flows = [e.get('flow') for e in entries(tmp_path / 'a')[0]]
    forced = [e.get('self_forcing') for e in entries(tmp_path / 'a')[0]]
    assert flows[0] > 0 and flows[1] > 0 and not any(flows[2:4]) and not any(forced[2:4])


def test_the_term_of_imagined_frames_is_that_of_what_follows(demo, tmp_path, monkeypatch):
    """Against the mean over the frames of both halves of a batch, by hand."""
    options = (*demo, *SMALL, '--channels=3', '--project=learned', f'--probe={data.ENVIRONMENT}', '--self_forcing=1', '--max_steps=1',
               '--align=regress', '--log_interval=1')
    seen = []
    real = model.rollout
    monkeypatch.setattr(model, 'rollout', lambda *args, **given: seen.append(real(*args, **given)) or seen[-1])
    g = script('train.py', *options, '--micro_batch=2', f'--out_dir={tmp_path}/a')
    imagined = torch.cat([x for x in seen if x.requires_grad]).detach()
    batch = g['clips'][0]
    T = batch['p'].shape[1]
    known = batch['z_mask'] & ~batch['p'].isnan().any(dim=2)
    off = [], []
    for b, t in itertools.product(range(len(imagined)), range(T // 2, T)):
        if known[b, t]:
            reader = g['aligned']
            off[0].append((reader(imagined[b, t - T // 2]) - reader.code(batch['p'][b, t])).square().mean().item())
            off[1].append((reader(g['normalised'](batch)[0][b, t]) - reader.code(batch['p'][b, t])).square().mean().item())
    told = json.loads((tmp_path / 'a/log.jsonl').read_text().splitlines()[0])['align']
    assert 0 < len(off[0]) < known[:, T // 2:].numel() and told == pytest.approx(np.mean(off[0]), rel=1e-3)
    assert told != pytest.approx(np.mean(off[1]), rel=0.05), 'not of the real ones'


def test_mistakes_with_projections(demo, tmp_path):
    for given, said in ((['--project=learned'], '--project=learned: wants --channels'), (['--align=regress'], '--align=regress: wants --project=learned'),
                        (['--align=regress', '--project=learned', '--channels=3'], 'and --probe='),
                        (['--align=infonce', '--project=learned', '--channels=3', '--probe=observation.state'], '--self_forcing above 0')):
        assert said in ends('train.py', *demo, *SMALL, *given, '--max_steps=1', f'--out_dir={tmp_path}/o')
    assert not (tmp_path / 'o').exists()
    given = *SMALL, '--max_steps=1', '--probe=observation.state', '--self_forcing=1', '--frames=4'
    script('train.py', *demo, *given, '--channels=3', '--project=learned', '--align=regress', f'--out_dir={tmp_path}/a')
    frames = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), np.uint8)
    rows = {'observation.images.top': frames, 'action': np.zeros((30, 2)), 'observation.state': frames[:, 0, :2, 0] / 1.0, 'task': ''}
    write_lerobot(tmp_path / 'other', [rows] * 4, 10)
    line = ends('train.py', f'--labelled={tmp_path}/other', *given, '--unlabelled=', f'--init={tmp_path}/a/ckpt.safetensors', f'--out_dir={tmp_path}/o')
    assert line.startswith('--probe=observation.state: ') and 'was aligned to' in line and not (tmp_path / 'o').exists()
    script('train.py', *demo, *given, f'--init={tmp_path}/a/ckpt.safetensors', f'--out_dir={tmp_path}/b')


def test_actions_are_their_leading_principal_components(demo, tmp_path):
    """Of all model steps of training episodes, against numpy's SVD in float64; resumed bitwise, seen by decode.py, and
    forgotten where a run begins with such a checkpoint and takes all actions."""
    out, options = tmp_path / 'o', (*demo, *SMALL, '--frameskip=4', '--frames=2', '--cache=False', '--workers=0')
    script('train.py', *options, '--action_pca=3', '--max_steps=2', f'--out_dir={tmp_path / "two"}')
    g = script('train.py', *options, '--action_pca=3', '--max_steps=4', '--save_interval=2', f'--out_dir={out}')
    net, config = model.load(out / 'ckpt.safetensors')
    ds, = g['sets']['labelled']
    steps = []
    for e in g['clips'].train[0]:
        rows = (ds.rows(e).astype(np.float64) - ds.stats['mean']) / ds.stats['std']
        steps += [rows[i:i + 4].ravel() for i in range(len(rows) - 4)]
    steps = np.array(steps)         # (n, 8)
    assert 20 < len(steps) < 1024 and config['action_pca'] == net.config['action_dim'] == 3
    U, S, V = np.linalg.svd(steps, full_matrices=False)
    basis, chunks = (net.stats[name].double().numpy() for name in ('a_basis', 'a_chunks'))
    scale = S[0] / len(steps) ** 0.5
    assert np.allclose(np.abs(basis.T @ V[:3].T) * scale, np.eye(3), atol=1e-5)
    back = steps @ basis @ np.linalg.pinv(basis)
    assert np.allclose(back, U[:, :3] * S[:3] @ V[:3], atol=1e-5)
    order = [np.lexsort(x.T.round(4)) for x in (steps @ basis, chunks)]
    assert np.allclose((steps @ basis)[order[0]], chunks[order[1]], atol=1e-4)
    assert np.allclose(np.square(chunks).mean(axis=0), np.square(S[:3] / S[0]), atol=1e-5)
    batch = g['clips'].some(2, 1024, 'labelled', g['clips'].train)
    z, a, known, _ = g['normalised'](batch)
    assert torch.allclose(a, batch['a'] @ net.stats['a_basis'], atol=1e-5) and not a[~known].any()
    change = (z[:, 1] - z[:, 0]).double().numpy()[known[:, 1].numpy()]
    assert np.allclose(net.stats['a_change'], np.mean(change ** 2, axis=0), atol=1e-5)
    two = model.load(tmp_path / 'two/ckpt.safetensors')[0].stats
    assert two.keys() == net.stats.keys() and all(torch.equal(v, two[k]) for k, v in net.stats.items())
    line = ends('train.py', *options, '--action_pca=8', '--max_steps=5', '--resume=True', f'--out_dir={out}')
    assert line == f'--action_pca: 8 cannot go on from {out}/ckpt.safetensors, which has 3'
    script('train.py', *options, '--action_pca=3', '--max_steps=5', '--resume=True', f'--out_dir={out}')
    resumed = model.load(out / 'ckpt.safetensors')[0].stats
    assert all(torch.equal(v, resumed[k]) for k, v in net.stats.items())
    script('decode.py', f'--ckpt={out}/ckpt.safetensors', '--rows=2', '--steps=2', '--K=2', '--device=cpu')
    script('train.py', *options[:2], f'--init={out}/ckpt.safetensors', '--frameskip=2', '--frames=2', '--max_steps=1', '--batch_size=4', '--eval_clips=4',
           '--device=cpu', f'--out_dir={tmp_path / "fine"}')
    fine, _ = model.load(tmp_path / 'fine/ckpt.safetensors')
    assert 'a_basis' not in fine.stats and fine.config['action_dim'] == 4 and torch.equal(fine.stats['z_std'], net.stats['z_std'])


def test_what_principal_components_of_actions_want(demo, tmp_path):
    rng = np.random.default_rng(0)
    for name, width in ('same', 2), ('wide', 3):
        write_lerobot(tmp_path / name, [
            {'observation.images.top': rng.integers(0, 255, (9, 28, 28, 3), np.uint8), 'task': 't',
             'action': rng.normal(5, 9, (9, width))} for _ in range(3)], 10)
    small = *SMALL, '--max_steps=1', f'--out_dir={tmp_path / "o"}'
    for options, words in (([demo[0], '--action_pca=5'], '--action_pca=5: wants labelled datasets whose actions are of one width, and at most the 4'),
                           ([f'--labelled={tmp_path}/same,{tmp_path}/wide', '--action_pca=2'], '--action_pca=2: wants labelled datasets whose actions are of one width'),
                           ([demo[1], '--labelled=', '--action_pca=2'], '--action_pca=2: wants labelled'),
                           ([demo[0], '--action_pca=-1'], '--action_pca: wants 0 or more')):
        assert words in ends('train.py', *options, *small) and not (tmp_path / 'o').exists()
    line = ends('train.py', f'--labelled={tmp_path}/same', '--frameskip=10', '--action_pca=2', *small)
    assert line == '--action_pca=2: 0 clips are longer than a model step'
    script('train.py', f'--labelled={tmp_path}/same,{tmp_path}/same', '--action_pca=2', *small)


@pytest.mark.parametrize('objective', ['shortcut', 'direct'])
def test_what_remembers_learns_from_clips_with_memories(demo, tmp_path, monkeypatch, objective):
    """And all else from the clips alone, which are those of a run without memory."""
    seen, loss, errors, forced = {}, model.shortcut_loss, model.policy_errors, model.rollout

    def note(name, f):
        def noted(net, *given, **more):
            seen.setdefault(name, []).append((*given[:4], more))
            return f(net, *given, **more)
        monkeypatch.setattr(model, f.__name__, noted)
    for name, f in ('loss', loss), ('policy', errors), ('rollout', forced):
        note(name, f)
    options = (*demo, *SMALL, '--frames=5', '--max_steps=4', '--grow=0.5', '--policy=True', '--self_forcing=0.5', '--context=2',
               '--eval_interval=9', f'--objective={objective}', '--micro_batch=2')
    found = {}
    for memory in 0, 4:
        g = script('train.py', *options, f'--memory={memory}', '--memory_frames=4', f'--out_dir={tmp_path}/{memory}')
        found[memory], seen = seen.copy(), {}
        assert g['options']['memories'] == (3 if memory else 0)
    for name in 'loss', 'policy', 'rollout':
        assert len(found[0][name]) == len(found[4][name]) > 3, name
        for without, remembers in zip(found[0][name], found[4][name]):
            n = 3 if name == 'loss' else 0
            assert torch.equal(remembers[0][:, n:].nan_to_num(), without[0].nan_to_num())
            assert remembers[0].shape[1] == n + without[0].shape[1]
    assert [x[0].shape[1] for x in found[4]['loss']] == [5, 5, 7, 7, 8, 8, 8, 8]
    padding = torch.cat([x[3][:, :3] for x in found[4]['loss']])
    assert padding.any() and not padding.all()
    counts = [entries(tmp_path / str(memory))[0][-1].keys() for memory in (0, 4)]
    assert counts[0] == counts[1] and {'policy', 'self_forcing'} <= counts[0]


@pytest.mark.parametrize('cache, state, memory', [(True, '', 0), (False, '', 3), (True, 'observation.state', 0)])
def test_resume_is_bitwise(demo, tmp_path, monkeypatch, cache, state, memory):
    """Six steps at once, or three, the file, and three more: the same file, bit for bit, and the same log."""
    options = (*demo, *SMALL, '--max_steps=6', '--save_interval=3', '--log_interval=1', '--eval_interval=3',
               '--bootstrap_start=0.2', f'--cache={cache}', '--workers=1', f'--state={state}', f'--policy={not cache or bool(state)}', f'--dream={0.7 * bool(state)}', f'--relabel={0.5 * (not cache or bool(state))}',
               f'--attention={"factored" if cache else "flat"}', f'--memory={memory}', f'--channels={8 if cache else 0}')
    whole, half = tmp_path / 'whole', tmp_path / 'half'
    save = model.save

    def keep(path, *rest):      # when step 6 is about to be saved, what lies there is step 3
        if os.path.isfile(whole / 'optim.pt') and not half.exists():
            shutil.copytree(whole, half)
        save(path, *rest)
    monkeypatch.setattr(model, 'save', keep)
    script('train.py', *options, f'--out_dir={whole}')
    monkeypatch.setattr(model, 'save', save)
    assert torch.load(half / 'optim.pt')['step'] == 3
    script('train.py', *options, f'--out_dir={half}', '--resume=True')
    a, b = (safetensors.torch.load_file(out / 'ckpt.safetensors') for out in (whole, half))
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []
    a, b = (torch.load(out / 'optim.pt') for out in (whole, half))
    assert torch.equal(a['rms'], b['rms'])
    assert all(torch.equal(a['optimizer']['state'][i][k], b['optimizer']['state'][i][k])
               for i in a['optimizer']['state'] for k in ('exp_avg', 'exp_avg_sq', 'step'))
    (steps, vals), (steps2, vals2) = entries(whole), entries(half)
    # the copy's log was three steps ahead of its files
    assert [(e['step'], e['loss']) for e in steps] == [(e['step'], e['loss']) for e in steps2]
    assert vals == vals2 and len(steps2) == 6


@pytest.fixture
def half(trained, demo, tmp_path):
    """A copy of a run, and the options that go on from it, but for the number of steps."""
    out = shutil.copytree(trained, tmp_path / 'out')
    return out, (*demo, *SMALL, '--resume=True', f'--out_dir={out}')


def test_resume_refuses_another_shape_or_other_data(half, tmp_path):
    out, options = half
    assert 'there is no' in ends('train.py', *options, f'--out_dir={tmp_path / "none"}')
    options += ('--max_steps=20',)
    assert ends('train.py', *options, '--frameskip=3') == \
        f'--frameskip: 3 cannot go on from {out}/ckpt.safetensors, which has 2'
    assert '--layers: 3 cannot go on' in ends('train.py', *options, '--layers=3')
    whole = (out / 'ckpt.safetensors').read_bytes()
    (out / 'ckpt.safetensors').write_bytes(whole[:1000])
    assert 'not a readable checkpoint' in ends('train.py', *options)
    assert (out / 'ckpt.safetensors').read_bytes() == whole[:1000]


def test_resume_after_a_kill_between_two_renames(half):
    out, options = half
    options += ('--max_steps=20',)
    state = torch.load(out / 'optim.pt')
    for earlier in (None, dict(state, step=10)):        # before the first save, or later
        os.rename(out / 'optim.pt', out / 'optim.pt.new')
        if earlier:
            torch.save(earlier, out / 'optim.pt')
        script('train.py', *options)
        assert not (out / 'optim.pt.new').exists() and torch.load(out / 'optim.pt')['step'] == 20
    torch.save(dict(state, step=10), out / 'optim.pt')
    assert ends('train.py', *options).startswith(f'{out}/optim.pt is of step 10, {out}/ckpt.safetensors of step 20')


class Evil:
    def __reduce__(self):
        return os.mkdir, ('evil',)


def test_a_state_of_the_optimizer_that_is_cut_or_would_run_code(half, tmp_path, monkeypatch):
    out, options = half
    monkeypatch.chdir(tmp_path)
    whole = (out / 'optim.pt').read_bytes()
    for content in (whole[:len(whole) // 2], b'', pickle.dumps(Evil()), pickle.dumps(dict(step=20))):
        (out / 'optim.pt').write_bytes(content)
        assert 'optim.pt: not a readable state of the optimizer' in ends('train.py', *options)
    for change in dict(step=torch.zeros(2)), dict(step=None), dict(log={}), dict(skipped='x'):
        torch.save(torch.load(io.BytesIO(whole)) | change, out / 'optim.pt')
        assert 'optim.pt: not a readable state of the optimizer' in ends('train.py', *options)
    state = torch.load(io.BytesIO(whole))
    del state['step']
    torch.save(state, out / 'optim.pt')
    assert 'optim.pt: not a readable state of the optimizer' in ends('train.py', *options)
    os.remove(out / 'optim.pt')
    assert 'optim.pt: not a readable' in ends('train.py', *options) and not os.path.exists('evil')


@pytest.mark.parametrize('name, value', [('exp_avg', torch.zeros(3)), ('step', None), ('exp_avg_sq', [1.])])
def test_a_state_of_the_optimizer_of_another_model(half, name, value):
    out, options = half
    state = torch.load(out / 'optim.pt')
    state['optimizer']['state'][0][name] = value
    torch.save(state, out / 'optim.pt')
    assert 'optim.pt: not of this model' in ends('train.py', *options)


def test_the_optimizer_goes_on_with_the_options_of_now(half):
    out, options = half
    state = torch.load(out / 'optim.pt')
    for group in state['optimizer']['param_groups']:
        group |= dict(betas=(0.5, 0.5), amsgrad=True, differentiable=True)
    torch.save(state, out / 'optim.pt')
    for group in script('train.py', *options, '--max_steps=21')['optimizer'].param_groups:
        assert group['betas'] == (0.9, 0.95) and not group['amsgrad'] and not group['differentiable']


def test_a_full_disk_leaves_the_checkpoint_before(half, monkeypatch):
    out, options = half
    before = {path.name: path.read_bytes() for path in out.glob('*[st]')}

    def full(*_):
        raise RuntimeError('unexpected pos')        # what torch makes of it
    monkeypatch.setattr(torch, 'save', full)
    line = ends('train.py', *options, '--max_steps=22')
    assert line.startswith(f'{out}/optim.pt: cannot be written (RuntimeError: unexpected pos)')
    monkeypatch.undo()
    assert len(before) == 2 and before == {path.name: path.read_bytes() for path in out.glob('*[st]')}
    script('train.py', *options, '--max_steps=22')
    assert [e['step'] for e in entries(out)[0]] == [20, 22]


def test_what_a_run_goes_on_with_may_have_moved_but_not_changed(half, demo, tmp_path):
    out, options = half
    folder = shutil.copytree(demo[0].partition('=')[2], tmp_path / 'moved')
    script('train.py', *options, f'--labelled={folder}', '--max_steps=21')
    assert model.load(out / 'ckpt.safetensors')[1]['labelled'] == str(folder)
    data.write_demo(tmp_path / 'other', 6, True, seed=5)
    assert ends('train.py', *options, f'--labelled={tmp_path}/other').startswith('--datasets: ')


def test_torchruns_restarts_go_on(half, monkeypatch, tmp_path):
    """Where the same command has left a checkpoint; another's is moved aside as ever."""
    out, options = half
    options = *(option for option in options if 'resume' not in option), '--max_steps=22'
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    script('train.py', *options)
    assert model.load(tmp_path / 'out.1/ckpt.safetensors')[0].step == 20
    first = entries(out)
    script('train.py', *options)
    assert entries(out) == first and not os.path.exists(tmp_path / 'out.2')
    script('train.py', *options, '--max_steps=23', '--resume=True')     # the checkpoint is another command's
    assert [e['step'] for e in entries(out)[0]] == [22, 23] and not os.path.exists(tmp_path / 'out.2')


@pytest.mark.parametrize('options, left', [
    (['--labelled=own'], ['own', '']), (['--labelled=demo/pick'], ['demo/pick', '']),
    (['--labelled=demo/labelled', '--unlabelled=own'], ['demo/labelled', 'own']),
    (['--unlabelled='], ['demo/labelled', '']), ([], ['demo/labelled', 'demo/unlabelled'])])
def test_the_demo_world_is_not_mixed_into_other_data_but_by_name(demo, tmp_path, monkeypatch, options, left):
    monkeypatch.chdir(tmp_path)
    os.mkdir('demo')
    for name, option in (('own', 0), ('demo/pick', 0), ('demo/labelled', 0), ('demo/unlabelled', 1)):
        os.symlink(demo[option].partition('=')[2], name)
    g = script('train.py', *SMALL, '--max_steps=1', '--cache=False', '--workers=0', *options)
    assert [g['config'][kind] for kind in ('labelled', 'unlabelled')] == left
    assert len(g['clips'].sets) == sum(map(bool, left))


def test_an_earlier_run_is_moved_aside(demo, tmp_path, capsys):
    out = tmp_path / 'out'
    for n in range(3):
        script('train.py', *demo, *SMALL, '--max_steps=1', f'--seed={n}', f'--out_dir={out}')
    assert [model.load(tmp_path / d / 'ckpt.safetensors')[1]['seed'] for d in ('out.1', 'out.2', 'out')] == [0, 1, 2]
    assert f'it is now {out}.2' in capsys.readouterr().out
    line = ends('train.py', *demo, *SMALL, f'--out_dir={out}/log.jsonl')
    assert line.startswith(f'{out}/log.jsonl: cannot be written')


def test_folders_in_that_of_an_earlier_run_stay(demo, tmp_path, monkeypatch):
    """A dataset, a cache, another run; and what is moved may be moved to another disk."""
    out = tmp_path / 'out'
    inside = out / 'data'
    shutil.copytree(demo[0].partition('=')[2], inside)
    options = f'--labelled={inside}', '--unlabelled=', *SMALL, '--max_steps=1', f'--cache_dir={out}/latents', f'--out_dir={out}'
    script('train.py', *options)
    cached = sorted((out / 'latents').rglob('*'))

    def other_disk(a, b):
        raise OSError(errno.EXDEV, 'Invalid cross-device link')
    with monkeypatch.context() as patch:
        patch.setattr(os, 'rename', other_disk)
        script('train.py', *options)
    assert {p.name for p in (tmp_path / 'out.1').iterdir()} == {'ckpt.safetensors', 'optim.pt', 'log.jsonl'}
    assert sorted((out / 'latents').rglob('*')) == cached and inside.is_dir()


def test_the_loss_falls(demo, tmp_path):
    script('train.py', *demo, *SMALL, '--max_steps=200', '--batch_size=8', '--log_interval=10',
           f'--out_dir={tmp_path / "o"}')
    flow = [e['flow'] for e in entries(tmp_path / 'o')[0]]
    assert sum(flow[-3:]) < 0.5 * sum(flow[:3])


@pytest.mark.parametrize('options', [
    ['--objective=diffusion'], ['--objective=direct'], ['--tau_schedule=uniform', '--p_image=1.0'], ['--p_null=1.0'],
    ['--action_on=token', '--registers=0'], ['--attention=flat', '--objective=direct', '--state=observation.state'],
    ['--attention=flat', '--self_forcing=1.0', '--frames=5', '--remat=True'],
    ['--unlabelled=', '--labelled_share=0.0'], ['--labelled='],
    ['--frameskip=4'],
    ['--dtype=bfloat16', '--grad_clip=0.0'], ['--k_max=16', '--K=16', '--bootstrap=1.0', '--bootstrap_start=0.0'],
    ['--frame_height=28', '--frame_width=42'], ['--context=2', '--time_every=2', '--frames=9'],
    ['--cache=False', '--workers=0'], ['--tau_schedule=logit-normal', '--tau_shift=0.0', '--p_past=0.0'],
    ['--ramp=False', '--space=v', '--bootstrap_start=0.0'], ['--wide_layers=2', '--micro_batch=1'],
    ['--frames=8', '--grow=1.0', '--decay=0.3'], ['--long_frames=8', '--long_share=0.5', '--remat=True'],
    ['--memory=3', '--memory_frames=3', '--context=2', '--micro_batch=3', '--cache=False', '--augment=0.5', '--policy=True'],
    ['--memory=5', '--frames=6', '--attention=flat', '--self_forcing=1.0', '--state=observation.state', '--compile=False'],
    ['--memory=3', '--objective=direct', '--policy=True', '--relabel=1.0', '--dream=0.5', '--grow=0.5', '--remat=True'],
    ['--self_forcing=1.0', '--frames=5'], ['--self_forcing=1.0', '--objective=direct', '--decay=0.0'],
    ['--state=observation.state', '--self_forcing=1.0', '--frames=5', '--wide_layers=1', '--bootstrap_start=0.0'],
    ['--state=observation.state.y', '--objective=direct', '--remat=True', '--micro_batch=3'],
    ['--ema=0.0', '--weight_decay=0.1', '--soft_cap=5.0', '--size=tiny', '--eval_context=3', '--val_share=0.5']])
def test_every_option_works_off_its_default(demo, tmp_path, options):
    script('train.py', *demo, *SMALL, '--max_steps=3', f'--out_dir={tmp_path / "o"}', *options)
    steps, vals = entries(tmp_path / 'o')
    assert math.isfinite(steps[-1]['loss']) and vals[-1]['step'] == 3
    net, config = model.load(tmp_path / 'o' / 'ckpt.safetensors')
    for option in options:
        name, _, text = option[2:].partition('=')
        assert str(config[name]) == text


def losses(out, *options):
    script('train.py', *SMALL, '--max_steps=2', '--log_interval=1', f'--out_dir={out}', *options)
    return [e['loss'] for e in entries(out)[0]]


@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile on a CPU needs g++')
def test_compile(demo, tmp_path):
    plain, fast = (losses(tmp_path / str(c), *demo, f'--compile={c}') for c in (False, True))
    assert np.round(plain, 4) == pytest.approx(np.round(fast, 4), abs=2e-3)


def test_latents_from_a_cache_equal_latents_made_on_the_way(demo, tmp_path):
    disk = f'--cache_dir={tmp_path / "l"}'
    ways = (), ('--cache=False',), (disk,), (disk, '--workers=0'), (disk, '--store=int8')
    found = [losses(tmp_path / str(i), *demo, '--workers=2', *way) for i, way in enumerate(ways)]
    assert found[0] == pytest.approx(found[1], rel=2e-3) and found[0] == pytest.approx(found[4], rel=2e-2)
    assert found[0] == found[2] == found[3] and len(os.listdir(tmp_path / 'l')) == 4


def test_a_loss_that_is_not_finite_stops_the_run(demo, tmp_path):
    line = ends('train.py', *demo, *SMALL, '--max_steps=50', '--log_interval=1', '--save_interval=50', '--warmup=0',
                '--learning_rate=1', '--beta1=0', '--grad_clip=0.0', '--weight_decay=1e5', f'--out_dir={tmp_path / "o"}')
    assert line.startswith('step ') and 'not finite' in line and not (tmp_path / 'o' / 'ckpt.safetensors').exists()
    assert line.count('labelled ') == 4 and re.search(r'/labelled [0-5]:\d+, ', line), 'all clips of the batch'


def test_clips_that_are_not_finite_are_named_and_may_be_skipped(demo, tmp_path, monkeypatch, capsys):
    encode = data.cached_latents

    def spoil(sets, *rest):
        latents = encode(sets, *rest)
        latents[0, 2, 'observation.images.top']['z'][:, 0, 0] = np.inf
        return latents
    monkeypatch.setattr(data, 'cached_latents', spoil)
    options = (*demo, *SMALL, '--max_steps=20', '--log_interval=1', f'--out_dir={tmp_path / "o"}')
    line = ends('train.py', *options)
    step = int(line.split()[1][:-1])
    assert re.fullmatch(r'step \d+: the loss or its gradient is not finite; nothing has been saved since; it saw '
                        r'(\S*labelled \d:\d+(, |$)){4}', line) and '/labelled 2:' in line
    script('train.py', *options, '--skip_nonfinite=20')
    steps, _ = entries(tmp_path / 'o')
    assert [e['loss'] is None for e in steps[:step]] == [False] * (step - 1) + [True]
    assert [e.get('skipped', 0) for e in steps] == np.cumsum([e['loss'] is None for e in steps]).tolist()
    said = capsys.readouterr().out
    assert f'step {step}: the loss or its gradient is not finite: left out (1 of 20), in ' in said
    assert all(p.isfinite().all() for p in model.load(tmp_path / 'o/ckpt.safetensors')[0].parameters())
    line = ends('train.py', *options, '--skip_nonfinite=1')
    assert int(line.split()[1][:-1]) == [e.get('skipped') for e in steps].index(2) + 1


def test_bfloat16_learns_what_float32_learns(demo, tmp_path):
    """Over 300 steps, evaluated alike: within two per cent."""
    errors = []
    for dtype in ('float32', 'bfloat16'):      # on a CPU without instructions for it: slow
        script('train.py', *demo, *SMALL, '--max_steps=300', '--batch_size=2', '--frames=3', f'--dtype={dtype}',
               '--val_share=0.2', f'--out_dir={tmp_path / dtype}')
        steps, vals = entries(tmp_path / dtype)
        errors.append([*vals[-1]['val']['labelled']['model'].values(), np.mean([e['flow'] for e in steps])])
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def torchrun(processes):
    return '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'


def start(*options, launcher=(), script=ROOT / 'train.py'):
    return subprocess.Popen([sys.executable, *launcher, str(script), *options], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)))


def finish(*options, code=0, script=ROOT / 'train.py'):
    """stdout and stderr of two processes."""
    run = start(*options, launcher=torchrun(2), script=script)
    said, errors = run.communicate(timeout=200)
    assert (run.returncode == 0) == (code == 0), errors
    return said, errors


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_well(demo, tmp_path, number):
    """Also where all of a process group gets it, as from torchrun, a terminal or a cluster: workers do not die of it."""
    out = tmp_path / 'out'
    run = start(*demo, *SMALL, '--max_steps=100000', '--log_interval=5', '--save_interval=100000', f'--out_dir={out}',
                '--eval_interval=100000', '--cache=False', '--workers=1')
    while not run.stdout.readline().startswith('step '):
        assert run.poll() is None, run.stderr.read()
    line = ends('train.py', *demo, *SMALL, f'--out_dir={out}')
    assert line.startswith(f'{out}: process {run.pid} on host ')
    os.killpg(run.pid, number)
    said, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    assert said.count('saving at the end of this step') == 1 and '--resume=True goes on' in said
    step = model.load(out / 'ckpt.safetensors')[0].step
    assert torch.load(out / 'optim.pt')['step'] == step >= 5
    script('train.py', *demo, *SMALL, f'--max_steps={step + 2}', f'--out_dir={out}', '--resume=True', '--cache=False')
    assert model.load(out / 'ckpt.safetensors')[0].step == step + 2


def test_signals_are_heard_in_a_long_step(demo, tmp_path):
    """In one call of half a minute, in which Python runs no handlers: the first is answered, the second ends it."""
    (tmp_path / 'long.py').write_text("""
import runpy, sys
import torch
torch.nn.utils.clip_grad_norm_ = lambda *_: print('in it', flush=True) or torch.linalg.svd(torch.rand(5000, 5000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
""")
    run = start(ROOT / 'train.py', *demo, *SMALL, f'--out_dir={tmp_path}/out', script=tmp_path / 'long.py')
    while run.stdout.readline() != 'in it\n':
        assert run.poll() is None, run.stderr.read()
    begun = time.monotonic()
    run.send_signal(signal.SIGINT)
    assert run.stdout.readline() == 'saving at the end of this step; a second signal ends at once\n'
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 1 and time.monotonic() < begun + 10


def test_two_processes_train_one_model(demo, tmp_path):
    """torchrun on CPUs; gradients are averaged, so both hold the same weights (DDP checks shapes, not this)."""
    out = tmp_path / 'out'
    said, errors = finish(*demo, *SMALL, '--workers=1', '--batch_size=2', '--max_steps=12', '--log_interval=4', f'--out_dir={out}')
    steps, vals = entries(out)
    assert [e['step'] for e in steps] == [4, 8, 12] and vals[-1]['step'] == 12 and said.count('trained 12 steps') == 1
    assert 'Warning' not in errors and said.count(f' MB in {out}/latents@') == 2 and not list(out.glob('latents*'))
    finish(*demo, *SMALL, '--batch_size=2', '--max_steps=1', f'--init={out}/ckpt.safetensors', f'--out_dir={out}')
    assert model.load(f'{out}.1/ckpt.safetensors')[0].step == 12 and model.load(out / 'ckpt.safetensors')[0].step == 1
    _, errors = finish(*demo, *SMALL, '--batch_size=3', f'--out_dir={out}', code=1)
    assert errors.count('--batch_size=3: 3 clips a step in all do not divide by 2 processes') == 1


def test_a_run_goes_on_with_another_number_of_processes(demo, tmp_path, capsys):
    options = (*demo, *SMALL, '--log_interval=1', '--decay=0', '--bootstrap_start=0')
    finish(*options, '--max_steps=4', f'--out_dir={tmp_path}/two')
    script('train.py', *options, '--max_steps=8', f'--out_dir={tmp_path}/two', '--resume=True')
    assert 'resume: processes was 2, now 1' in capsys.readouterr().out
    script('train.py', *options, '--max_steps=8', f'--out_dir={tmp_path}/one')
    (one, vals), (two, vals2) = (entries(tmp_path / out) for out in ('one', 'two'))
    assert [e['loss'] for e in two] == pytest.approx([e['loss'] for e in one], rel=1e-5)
    assert vals2[-1]['val']['labelled']['model'] == pytest.approx(vals[-1]['val']['labelled']['model'], rel=1e-4)


RUNS = """
import json, os, runpy, sys
import torch
import torch.distributed as dist
clip, meet = torch.nn.utils.clip_grad_norm_, dist.rendezvous
folder, script, runs = sys.argv[1:]
def keep(params, norm):
    grads[:0] = [p.grad.full_tensor() if hasattr(p.grad, 'full_tensor') else p.grad.clone() for p in params]
    return clip(params, norm)
torch.nn.utils.clip_grad_norm_ = keep
for n, options in enumerate(json.loads(runs)):
    grads = []
    dist.rendezvous = lambda url: iter([[dist.PrefixStore(str(n), next(meet(url))[0])]])
    sys.argv = [script, *options]
    runpy.run_path(script, run_name='__main__')
    torch.save(grads, f'{folder}/{n}-of-rank-' + os.environ.get('RANK', '0'))
torch.nn.utils.clip_grad_norm_, dist.rendezvous = clip, meet
"""


def gradients(folder, *runs, processes=2):
    """Of all steps of each of some runs, the last step's first. They follow each other in the same processes: to start
    some takes longer than to train."""
    folder.mkdir()
    (folder / 'runs.py').write_text(RUNS)
    given = str(folder), str(ROOT / 'train.py'), json.dumps(runs)
    if processes > 1:
        finish(*given, script=folder / 'runs.py')
    else:
        script(folder / 'runs.py', *given)
    return [torch.load(folder / f'{n}-of-rank-0') for n in range(len(runs))]


def test_gradients_do_not_depend_on_how_a_batch_is_split(demo, tmp_path):
    """One process, two, two with micro-batches, and two that shard; some clips are padded, some rows bootstrap."""
    options = [*demo, *SMALL, '--max_steps=2', '--batch_size=8', '--bootstrap=0.5', '--bootstrap_start=0.0',
               '--frames=24', '--p_image=0.5', '--learning_rate=0.03', '--warmup=0', '--eval_interval=100', '--policy=True',
               '--text=True']
    ways = {1: ([], ['--micro_batch=3']),
            2: ([], ['--micro_batch=2'], ['--fsdp=True'], ['--fsdp=True', '--micro_batch=1'])}
    found = []
    for n in ways:
        runs = [[*options, *more, f'--out_dir={tmp_path}/o{n}{"".join(more)}'] for more in ways[n]]
        found += gradients(tmp_path / str(n), *runs, processes=n)
    whole, *splits = found
    half = len(whole) // 2      # in the first step the head is still zero, and nothing below it has a gradient
    assert all(g.abs().max() > 0 for g in whole[:half])
    for how, split in zip((*ways[1][1:], *ways[2]), splits, strict=True):
        for part in (slice(0, half), slice(half, None)):
            one, other = (torch.cat([g.flatten() for g in of[part]]).double() for of in (whole, split))
            error = ((one - other).norm() / one.norm()).item()
            assert error < 1e-6, (how, error)


def test_what_does_not_learn_or_is_not_kept_ends_the_run(demo, tmp_path, monkeypatch):
    """The faults of earlier systems: a layer without a place in the loss, a list that hides layers, a buffer."""
    init, forward = model.WorldModel.__init__, model.WorldModel.forward

    def broken(how):
        def build(self, config):
            init(self, config)
            how(self)
        monkeypatch.setattr(model.WorldModel, '__init__', build)
        return ends('train.py', *demo, *SMALL, '--max_steps=2', f'--out_dir={tmp_path / "o"}')

    line = broken(lambda net: setattr(net, 'spare', torch.nn.Linear(2, 3)))
    assert line == 'model.spare.weight gets no gradient: the loss does not depend on it'
    monkeypatch.setattr(model.WorldModel, 'forward', lambda self, *x, **y: forward(self, *x, **y) * self.hidden[0][0])
    line = broken(lambda net: setattr(net, 'hidden', [torch.ones(7, 1, 1, 1, requires_grad=True)]))
    assert line.startswith('a tensor of shape (7, 1, 1, 1) gets a gradient but is no parameter of the model')
    monkeypatch.setattr(model.WorldModel, 'forward', forward)
    keep = model.WorldModel.state_dict
    monkeypatch.setattr(model.WorldModel, 'state_dict', lambda self, **how: {
        k: v for k, v in keep(self, **how).items() if 'z_in' not in k})
    assert broken(lambda net: None) == 'model.z_in.weight is not in the checkpoint'
    assert not (tmp_path / 'o' / 'ckpt.safetensors').exists()


def test_rate_warms_up_stays_and_falls(demo, tmp_path):
    script('train.py', *demo, *SMALL, '--max_steps=20', '--log_interval=1', '--decay=0.5', '--warmup=4',
           '--learning_rate=0.001', '--min_lr=0.0001', '--eval_interval=100', f'--out_dir={tmp_path / "o"}')
    lr = [e['lr'] for e in entries(tmp_path / 'o')[0]]
    assert lr[:4] == pytest.approx([0.00025, 0.0005, 0.00075, 0.001]) and lr[4:11] == [0.001] * 7
    assert lr[11:] == pytest.approx([0.0001 + 0.0009 * (20 - s) / 10 for s in range(11, 20)])
    script('train.py', *demo, *SMALL, '--max_steps=8', '--log_interval=1', '--warmup=2', '--learning_rate=0.00001',
           '--eval_interval=100', f'--out_dir={tmp_path / "low"}')
    assert [e['lr'] for e in entries(tmp_path / 'low')[0]][1:] == [1e-5] * 7, 'a rate below min_lr does not rise'


def test_what_the_optimizer_is_given(demo, tmp_path):
    """Gradients of a norm of at most grad_clip, which bootstrap rows have a part in from bootstrap_start on; the rate
    of the schedule; the matrices of linear layers are all that decays; and its weights are averaged."""
    norms, rates, average = [], [], {}

    def params(optimizer):
        return [p for group in optimizer.param_groups for p in group['params']]

    def before(optimizer, *_):
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in params(optimizer)]).item())
        rates.append([group['lr'] for group in optimizer.param_groups])
        if len(norms) == 1:
            average.update({p: p.detach().clone() for p in params(optimizer)})

    def after(optimizer, *_):       # of n steps the last has the weight 9 / (n + 9)
        for p in params(optimizer):
            average[p].lerp_(p.detach(), 9 / (len(norms) + 9))

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    g = script('train.py', *demo, *SMALL, '--max_steps=4', '--log_interval=1', '--grad_clip=0.01', '--weight_decay=0.1',
               '--bootstrap_start=0.5', '--eval_interval=100', f'--out_dir={tmp_path / "o"}')
    for hook in hooks:
        hook.remove()
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
    assert rates == [[e['lr']] * 2 for e in entries(tmp_path / 'o')[0]]
    for p, mean in zip(g['params'], g['ema_params']):
        torch.testing.assert_close(mean, average[p])
    assert [e['bootstrap'] is None for e in entries(tmp_path / 'o')[0]] == [True, True, False, False]
    names = {p: name for name, p in g['model'].named_parameters()}
    decay = {names[p]: group['weight_decay'] for group in g['optimizer'].param_groups for p in group['params']}
    assert decay['layers.0.mlp.down.weight'] == decay['a_in.weight'] == 0.1
    assert decay['z_in.bias'] == decay['registers'] == decay['tau_embed.weight'] == 0.0


def test_the_state_is_learned_and_told(demo, tmp_path):
    """Where the tip will be, from where it was and what was done; the same weights without a state begin another run."""
    given = *demo, *SMALL, '--objective=direct', '--state=observation.state', '--batch_size=16'
    script('train.py', *given, '--max_steps=150', '--learning_rate=0.01', '--eval_interval=150', f'--out_dir={tmp_path}/o')
    val = entries(tmp_path / 'o')[1][-1]['val']
    errors = val['labelled']
    assert {'state model', 'state repeat'} <= errors.keys() and not {'state model', 'state repeat'} & val['unlabelled'].keys()
    assert errors['state model']['1'] < 0.5 * errors['state repeat']['1'] and errors['state repeat']['20'] > 0.5
    net, config = model.load(tmp_path / 'o/ckpt.safetensors')
    assert net.config['state_dim'] == 2 and config['state_names'] == 'x,y'
    assert {'s_mean', 's_std', 's_change', 's_width', 'z_pair'} <= net.stats.keys()
    script('train.py', *demo, *SMALL[4:], f'--init={tmp_path}/o/ckpt.safetensors', '--max_steps=1', f'--out_dir={tmp_path}/p')
    net, config = model.load(tmp_path / 'p/ckpt.safetensors')
    assert net.config['state_dim'] == 0 and not [k for k in net.stats if k.startswith('s_')]
    script('train.py', *demo, *SMALL[4:], f'--init={tmp_path}/p/ckpt.safetensors', '--state=observation.state.x',
           '--max_steps=1', f'--out_dir={tmp_path}/q')
    assert model.load(tmp_path / 'q/ckpt.safetensors')[0].config['state_dim'] == 1
    del net.stats['z_pair']         # of before there was --state
    model.save(tmp_path / 'p/old.safetensors', net, config, {}, net.stats)
    line = ends('train.py', *demo, *SMALL[4:], f'--init={tmp_path}/p/old.safetensors', '--state=observation.state', f'--out_dir={tmp_path}/r')
    assert 'old.safetensors: was made before there was --state' in line and not (tmp_path / 'r').exists()


def test_a_probe_tells_errors_in_units(demo, tmp_path):
    """What is logged is what the probe of the checkpoint reads of held-out frames, real and imagined."""
    given = *demo, *SMALL, '--objective=direct', '--state=observation.state.y', '--batch_size=16', '--learning_rate=0.01'
    probe = f'--probe=observation.state,{data.ENVIRONMENT}.disc_x'
    g = script('train.py', *given, probe, '--max_steps=60', '--eval_interval=60', f'--out_dir={tmp_path}/o')
    told = json.loads((tmp_path / 'o/log.jsonl').read_text().splitlines()[-1])['probe']
    assert [*told] == ['observation.state.x', 'observation.state.y', f'{data.ENVIRONMENT}.disc_x']
    assert all([*e] == ['real', '1', '5', '10', '20'] for e in told.values())
    assert all(e['real']['median'] < .05 and e['real']['r2'] > .4 for e in told.values())
    net, config = model.load(tmp_path / 'o/ckpt.safetensors')
    reader = model.restore_probe(net.stats)
    assert config['probe_names'] == ','.join(told)
    batch = g['held_out']['labelled']
    assert torch.equal(batch['p'][:, :, 1].isnan(), batch['s'][:, :, 0].isnan())
    z, a, a_mask, z_mask = g['normalised'](batch)
    with torch.no_grad():
        imagined = model.rollout(net, z[:, :2], a, a_mask, K=g['K'])
    for h, frames, truth, real in (('real', z, batch['p'], z_mask), ('5', imagined[:, 4], batch['p'][:, 6], z_mask[:, 6])):
        off = (reader.read(frames[..., :g['N'], :]) - truth).abs()[real]
        want = off.median(dim=0).values
        assert [told[name][h]['median'] for name in told] == pytest.approx(want.tolist(), rel=1e-3)
        r2 = 1 - off.square().mean(dim=0) / batch['p'][z_mask].var(dim=0, correction=0)
        assert [told[name][h]['r2'] for name in told] == pytest.approx(r2.tolist(), rel=1e-3)
    script('train.py', *given, '--max_steps=60', '--resume=True', '--probe=observation.state.x', f'--out_dir={tmp_path}/o')
    again = model.load(tmp_path / 'o/ckpt.safetensors')
    assert again[0].step == 60 and again[1]['probe_names'] == 'observation.state.x' and len(model.restore_probe(again[0].stats).mean) == 1
    script('train.py', *given, '--max_steps=61', '--resume=True', f'--out_dir={tmp_path}/o')
    assert model.restore_probe(model.load(tmp_path / 'o/ckpt.safetensors')[0].stats) is None
    line = ends('train.py', *demo, '--probe=observation.state.x,observation.state', f'--out_dir={tmp_path}/q')
    assert line == 'observation.state.x,observation.state: names a number twice'
    line = ends('train.py', *demo, '--probe=observation.state.z', f'--out_dir={tmp_path}/q')
    assert line.startswith('--probe=observation.state.z: wants the same numbers in all labelled datasets') and not (tmp_path / 'q').exists()


def test_a_probe_leaves_out_what_does_not_change(tmp_path, capsys):
    """Or is never known, or is of another dataset; and an angle goes round."""
    rng = np.random.default_rng(0)
    for name in 'ab':
        episodes = []
        for _ in range(4):
            turn = rng.uniform(0, 360) + np.arange(12) * 15
            x = np.zeros((12, 28, 28, 3), np.uint8)
            x[..., 0] = (127 + 100 * np.sin(np.radians(turn)))[:, None, None]
            x[..., 1] = (127 + 100 * np.cos(np.radians(turn)))[:, None, None]
            state = np.stack((turn % 360, np.full(12, 7), np.full(12, np.nan)), axis=1).astype(np.float32)
            known = {'observation.state': state} if name == 'a' else {}
            episodes.append({'observation.images.top': x, 'task': 't', 'action': rng.normal(size=(12, 1))} | known)
        write_lerobot(tmp_path / name, episodes, 10, {'observation.state': ['turn.deg', 'stuck', 'lost']})
    script('train.py', f'--labelled={tmp_path}/a,{tmp_path}/b', '--unlabelled=', *SMALL, '--max_steps=1', '--frameskip=1', '--val_share=0.3',
           '--probe=observation.state', f'--out_dir={tmp_path}/o')
    assert 'as they do not change: observation.state.lost, observation.state.stuck' in capsys.readouterr().out
    assert '--probe=observation.state: no frame has all of them' in ends(
        'train.py', f'--labelled={tmp_path}/a', '--unlabelled=', *SMALL, '--max_steps=1', '--probe=observation.state', '--channels=2',
        '--project=learned', '--align=regress', '--align_dynamics=0', f'--out_dir={tmp_path}/p')
    net, config = model.load(tmp_path / 'o/ckpt.safetensors')
    assert config['probe_names'] == 'observation.state.turn.deg' and model.restore_probe(net.stats).turn.tolist() == [360]
    told = json.loads((tmp_path / 'o/log.jsonl').read_text().splitlines()[-1])['probe']['observation.state.turn.deg']['real']
    assert told['median'] < 10 and told['p90'] < 40 and told['r2'] > .9


def test_padded_frames_do_not_count_in_an_evaluation(demo, tmp_path):
    horizon_errors = script('train.py', *demo, *SMALL, '--max_steps=1', f'--out_dir={tmp_path / "o"}')['horizon_errors']
    z, z_mask = torch.randn(3, 22, 4, 2), torch.ones(3, 22, dtype=bool)
    z_mask[0, 11:] = z_mask[:, 20:] = False         # two frames are given, so 11 is step 10
    imagined = torch.zeros(3, 20, 4, 2).masked_fill(~z_mask[:, 2:, None, None], torch.nan)
    want = {'1': z[:, 2], '5': z[:, 6], '10': z[1:, 11]}
    want = {h: v.square().mean().item() for h, v in want.items()}
    assert horizon_errors(imagined, z, z_mask) == pytest.approx(want | {'20': None})


def test_shuffled_actions_are_of_another_clip(demo, tmp_path, capsys):
    for frameskip, kinds in (2, {'model', 'repeat', 'hidden', 'shuffled'}), (3, {'model', 'repeat', 'hidden'}):
        script('train.py', *demo, *SMALL, '--max_steps=1', f'--frameskip={frameskip}', f'--out_dir={tmp_path / "o"}')
        assert set(entries(tmp_path / 'o')[1][0]['val']['labelled']) == kinds
        assert ("without 'shuffled'" in capsys.readouterr().out) == ('shuffled' not in kinds)


def test_a_checkpoint_older_than_an_option_is_begun_with_as_it_was_made(trained, demo, tmp_path):
    """Its weights would fit either kind of attention."""
    with safetensors.safe_open(trained / 'ckpt.safetensors', 'pt') as f:
        tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    for name in ('config', 'model'):
        known = json.loads(metadata[name])
        del known['attention']
        metadata[name] = json.dumps(known)
    safetensors.torch.save_file(tensors, tmp_path / 'old.safetensors', metadata)
    line = ends('train.py', *demo, *SMALL, f'--init={tmp_path}/old.safetensors', '--attention=flat',
                f'--out_dir={tmp_path}/out')
    assert '--attention=flat: cannot begin with' in line and 'which has factored' in line


def test_a_run_begins_with_another_checkpoint(trained, tmp_path, capsys):
    """Of its weights, and the encoder and the statistics of latents that they know; actions are normalised anew."""
    net, config = model.load(trained / 'ckpt.safetensors')
    rng = np.random.default_rng(0)
    for name, width in ('same', 2), ('wide', 3):
        write_lerobot(tmp_path / name, [
            {'observation.images.top': rng.integers(0, 255, (50, 28, 28, 3), np.uint8), 'task': 't',
             'action': rng.normal(5, 9, (50, width))} for _ in range(3)], 10)
        script('train.py', f'--labelled={tmp_path / name}', f'--init={trained}/ckpt.safetensors', '--max_steps=1',
               '--batch_size=2', '--eval_clips=2', '--device=cpu', '--learning_rate=0', '--weight_decay=0', '--min_lr=0',
               f'--out_dir={tmp_path / "o"}')
        new, config = model.load(tmp_path / 'o/ckpt.safetensors')
        old = dict(net.named_parameters())
        differ = {k for k, v in new.named_parameters() if k not in old or not torch.equal(v, old[k])}
        assert differ == ({'a_in.weight'} if name == 'wide' else set())
        assert ('begins anew' in capsys.readouterr().out) == (name == 'wide')
        assert config['width'] == 32 and config['layers'] == 2
        measured = {'a_mean', 'a_std', 'a_low', 'a_high'} | ({'a_width'} if name == 'wide' else set())
        for key, v in new.stats.items():
            assert torch.equal(v, net.stats[key]) != (key in measured), key
        assert (new.stats['a_mean'] > 2).all()
    line = ends('train.py', f'--labelled={tmp_path}/same', f'--init={trained}/ckpt.safetensors', '--layers=3')
    assert line == f'--layers=3: cannot begin with {trained}/ckpt.safetensors, which has 2'
    script('train.py', f'--labelled={tmp_path}/wide', f'--init={trained}/ckpt.safetensors', '--max_steps=2', '--resume=True',
           '--batch_size=2', '--eval_clips=2', '--device=cpu', f'--out_dir={tmp_path / "o"}')


def test_long_clips_cost_the_same_tokens_and_nothing_is_compiled_twice(demo, tmp_path, monkeypatch):
    """Two lengths, students and teachers: after both have been seen once no shape is new."""
    from torch._dynamo.testing import CompileCounter
    counter, compiled, shapes = CompileCounter(), [], []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **how: setattr(
        self, '_compiled_call_impl', torch.compile(self._call_impl, backend=counter, **how)))
    loss = model.shortcut_loss

    def spy(run, z, *rest, **more):
        shapes.append(tuple(z.shape[:2]))
        compiled.append(counter.frame_count)
        return loss(run, z, *rest, **more)
    monkeypatch.setattr(model, 'shortcut_loss', spy)
    script('train.py', *demo, *SMALL, '--max_steps=16', '--batch_size=8', '--frames=2', '--long_frames=8',
           '--long_share=0.25', '--bootstrap=0.5', '--bootstrap_start=0.0', '--compile=True',
           f'--out_dir={tmp_path / "o"}')
    assert shapes == [(8, 2), (8, 2), (8, 2), (2, 8)] * 4
    assert 0 < compiled[1] < compiled[4] and len(set(compiled[4:])) == 1, compiled


def test_clips_grow(demo, tmp_path, monkeypatch):
    lengths, loss = [], model.shortcut_loss
    monkeypatch.setattr(model, 'shortcut_loss', lambda run, z, *rest, **more: (
        lengths.append(z.shape[1]) or loss(run, z, *rest, **more)))
    script('train.py', *demo, *SMALL, '--max_steps=12', '--frames=8', '--grow=0.5', f'--out_dir={tmp_path / "o"}')
    assert lengths == [2] * 3 + [4] * 3 + [8] * 6
    # .55 x 100 is more than 55; a dream wants whole clips
    options = *demo, *SMALL, '--max_steps=100', '--frames=4', '--eval_interval=200', '--grow=0.55', '--policy=True', '--dream=0.45'
    script('train.py', *options, '--dream_steps=1', '--batch_size=1', f'--out_dir={tmp_path / "d"}')


def test_a_world_model_learns_the_same_with_a_policy_beside_it(demo, tmp_path):
    """Bit for bit; and the policy learns, also from clips of two frames."""
    options = *demo, *SMALL, '--max_steps=40', '--eval_interval=40', '--self_forcing=0.2', '--grow=0.2', '--grad_clip=0.1', '--frames=5', '--val_share=0.2'
    for name, more in ('alone', []), ('beside', ['--policy=True', '--policy_steps=4']):
        script('train.py', *options, *more, f'--out_dir={tmp_path}/{name}')
    alone, beside = (safetensors.torch.load_file(tmp_path / name / 'ckpt.safetensors') for name in ('alone', 'beside'))
    assert all(torch.equal(alone[k], beside[k]) for k in alone) and {k.split('.')[-3] if '.layers.' not in k else 'policy'
                                                                      for k in beside.keys() - alone.keys()} <= {'policy', 'ema'}
    steps, vals = entries(tmp_path / 'beside')
    assert [e['policy'] is None for e in steps] == [False] * len(steps) and steps[-1]['policy'] < 0.9
    error, zero = (vals[-1]['val']['labelled'][name] for name in ('policy', 'policy zero'))
    assert error.keys() == {'1', '5', '10', '20'} and error['1'] < 0.95 * zero['1']
    assert ends('train.py', f'--unlabelled={demo[0].partition("=")[2]}', '--labelled=', *SMALL, '--policy=True',
                f'--out_dir={tmp_path}/q').startswith('--policy=True: wants --labelled')
    line = ends('train.py', *options, '--max_steps=50', '--resume=True', f'--out_dir={tmp_path}/beside')
    assert line.startswith('--policy: False cannot go on from')
    script('train.py', *demo, *SMALL, '--max_steps=2', '--policy=True', f'--init={tmp_path}/alone/ckpt.safetensors', f'--out_dir={tmp_path}/p')
    assert model.load(tmp_path / 'p/ckpt.safetensors')[0].policy
    script('train.py', *demo, *SMALL, '--max_steps=1', '--warmup=0', '--learning_rate=0', f'--init={tmp_path}/beside/ckpt.safetensors', f'--out_dir={tmp_path}/r')
    again = safetensors.torch.load_file(tmp_path / 'r/ckpt.safetensors')
    assert torch.allclose(again['policy.z_in.weight'], beside['ema.policy.z_in.weight'], atol=1e-3), 'it comes with the rest'


def test_a_policy_learns_in_the_dream_of_a_world_model_at_rest(demo, tmp_path, capsys):
    """From step 6 of 8 the world model stays, bit for bit, and its average; the policy changes, otherwise than from the
    data alone, goes on bitwise, and the same in two processes."""
    options = *demo, *SMALL, '--max_steps=8', '--dream=0.25', '--policy=True', '--objective=direct', '--eval_interval=99', '--log_interval=1', '--save_interval=6'
    kept = {}
    save = model.save

    def keep(path, net, config, ema, stats, step, weights):
        kept[step] = {k: v.clone() for k, v in (weights | {f'ema.{k}': v for k, v in ema.items()}).items()}
        save(path, net, config, ema, stats, step, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, 'save', keep)
        script('train.py', *options, f'--out_dir={tmp_path}/dream')
    before, after = kept[6], kept[8]
    for k in before:
        assert torch.equal(before[k], after[k]) == (not k.removeprefix('ema.').startswith('policy.')), k
    steps, _ = entries(tmp_path / 'dream')
    assert [('dream' in e, 'flow' in e) for e in steps] == [(False, True)] * 6 + [(True, False)] * 2
    assert 0 < steps[-1]['dream'] < 3 and steps[-1]['policy'] > 0
    assert steps[-1]['loss'] == pytest.approx(steps[-1]['dream'] + steps[-1]['policy'], rel=1e-4)
    script('train.py', *options, '--support=0.5', '--dream_steps=0', f'--out_dir={tmp_path}/data')
    last = entries(tmp_path / 'data')[0][-1]
    assert 'dream' not in last and last['loss'] == pytest.approx(0.5 * last['policy'], rel=1e-4)
    data_alone = safetensors.torch.load_file(tmp_path / 'data/ckpt.safetensors')
    assert torch.equal(data_alone['z_in.weight'], after['z_in.weight'])
    assert not torch.equal(data_alone['policy.out.weight'], after['policy.out.weight'])

    # from a world model that is there already
    begin = *demo, *SMALL, '--dream=1', '--policy=True', '--eval_interval=99', f'--init={tmp_path}/dream/ckpt.safetensors', '--learning_rate=0.001'
    script('train.py', *begin, '--max_steps=4', f'--out_dir={tmp_path}/whole')
    finish(*begin, '--max_steps=4', f'--out_dir={tmp_path}/ddp')
    whole, ddp = (safetensors.torch.load_file(tmp_path / name / 'ckpt.safetensors') for name in ('whole', 'ddp'))
    assert all(torch.allclose(whole[k], ddp[k], atol=2e-5) for k in whole)
    assert torch.equal(whole['z_in.weight'], after['ema.z_in.weight']) and torch.equal(ddp['z_in.weight'], whole['z_in.weight'])
    for wrong, words in ((['--policy=False'], '--dream=0.25: wants --policy=True'), (['--grow=0.9'], '--grow=0.9 to be over'),
                         (['--frames=2'], '--dream=0.25: wants --frames, of clips, to be more than --eval_context=2'),
                         (['--dream=2'], '--dream: wants 0 to 1'), (['--dream_steps=-1'], '--dream_steps: wants 0 or more')):
        assert words in ends('train.py', *options, *wrong, f'--out_dir={tmp_path}/q')


def test_clips_without_actions_get_the_policys(demo, tmp_path, monkeypatch):
    """In the second half, of a share of them, for every real frame, marked and with a weight of their own; the policy
    itself learns from none of these."""
    seen = []
    loss = model.shortcut_loss
    weights = []
    monkeypatch.setattr(model, 'shortcut_loss', lambda run, z, a, a_mask, z_mask, *rest, **more: (
        seen.append((z, a, a_mask, z_mask)) or weights.append(more['clip_weight']) or loss(run, z, a, a_mask, z_mask, *rest, **more)))
    options = *demo, *SMALL, '--max_steps=4', '--relabel_weight=0.25', '--labelled_share=0.5', '--batch_size=8', '--policy=True', '--eval_interval=9', '--frames=6'
    for share in '0.0', '0.5', '1.0':
        seen.append([])
        script('train.py', *options, f'--relabel={share}', f'--out_dir={tmp_path}/{share}')
    runs = [seen[1:5], seen[6:10], seen[11:15]]
    plain, half, whole = runs
    plain = [(z, F.pad(a, (0, 1)), *masks) for z, a, *masks in plain]           # has no number more, which marks guesses
    for run, low, high in (half, 1, 7), (whole, 8, 8):
        named = 0
        for step, ((z, a, a_mask, z_mask), (_, b, b_mask, _)) in enumerate(zip(run, plain)):
            without = ~b_mask.any(dim=1)
            assert without.sum() == 4 and torch.equal(a[~without], b[~without]) and torch.equal(a_mask[~without], b_mask[~without])
            given = a_mask[without].any(dim=1)
            assert torch.equal(a[:, :, -1] == 1, a_mask & ~b_mask) and torch.equal(a[:, :, -1] == 0, ~(a_mask & ~b_mask))
            weight = weights[4 * (1 + (run is whole)) + step][:, 0]
            assert torch.equal(weight == 0.25, (a_mask & ~b_mask).any(dim=1)) and {*weight.tolist()} <= {0.25, 1.0}
            named += int(given.sum())
            assert step >= 2 or not given.any()
            assert torch.equal(a_mask[without][given][:, 1:], z_mask[without][given][:, 1:]) and not a_mask[without][:, 0].any()
            assert not a[~a_mask].any() or torch.equal(a[~a_mask], b[~a_mask])
        assert low <= named <= high
    g = script('train.py', *options, '--relabel=1.0', '--dream=0.5', f'--out_dir={tmp_path}/dream')
    z, *_ = g['normalised'](g['clips'][0])
    acts = g['model'].act(z[:, 0], z[:, 1], z[:, -1], torch.full((len(z),), 3))
    assert acts[:, :-1].all() and not acts[:, -1].any(), 'nor does it learn in the dream that marks change what is imagined'
    a, b, plain = (safetensors.torch.load_file(tmp_path / share / 'ckpt.safetensors') for share in ('0.5', '1.0', '0.0'))
    assert all(torch.equal(a[k], b[k]) == k.removeprefix('ema.').startswith('policy.') for k in a if k.endswith(('in.weight', 'out.weight')) and 's_' not in k)
    begin = f'--init={tmp_path}/0.0/ckpt.safetensors', '--warmup=0', '--learning_rate=0', '--max_steps=1', '--save_interval=1'
    script('train.py', *options[:-2], '--relabel=0.5', *begin, f'--out_dir={tmp_path}/marks')
    c = safetensors.torch.load_file(tmp_path / 'marks/ckpt.safetensors')
    assert torch.equal(c['a_in.weight'][:, :-1], plain['ema.a_in.weight']) and not c['a_in.weight'][:, -1].any()
    assert torch.equal(c['policy.out.weight'][:-1], plain['ema.policy.out.weight']) and not c['policy.out.weight'][-1].any()
    script('plan.py', f'--ckpt={tmp_path}/1.0/ckpt.safetensors', '--episodes=2', '--budget=2', '--method=policy', f'--out_dir={tmp_path}/plan')
    script('train.py', *demo, *SMALL, '--policy=True', *begin, f'--init={tmp_path}/marks/ckpt.safetensors', f'--out_dir={tmp_path}/none')
    d = safetensors.torch.load_file(tmp_path / 'none/ckpt.safetensors')
    assert d.keys() == plain.keys() and all(torch.equal(d[k], plain[f'ema.{k}']) for k in d if k.startswith(('a_in', 'policy'))), 'and forgets them'
    for options, words in ((['--relabel=0.5', '--policy=True', '--labelled='], '--policy=True: wants --labelled'), (['--relabel=0.5'], '--relabel=0.5: wants --policy=True'), (['--relabel=0.5', '--policy=True', '--unlabelled='], 'and --unlabelled'), (['--relabel=2', '--policy=True'], '--relabel: wants 0 to 1')):
        assert words in ends('train.py', *demo, *SMALL, *options, f'--out_dir={tmp_path}/q')


def test_sharded_training_goes_on_bitwise(demo, tmp_path):
    """FSDP2: every process keeps its share of the optimizer; the checkpoint is one that needs no processes."""
    options = [*demo, *SMALL, '--fsdp=True', '--decay=0.0', '--bootstrap_start=0.0', '--frames=5', '--self_forcing=1.0', '--policy=True']
    gradients(tmp_path / 'g', *([*options, f'--max_steps={steps}', f'--out_dir={tmp_path / out}', f'--resume={resume}']
                                for out, steps, resume in (('whole', 4, False), ('parts', 2, False), ('parts', 4, True))))
    one, two = (safetensors.torch.load_file(tmp_path / out / 'ckpt.safetensors') for out in ('whole', 'parts'))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    net, config = model.load(tmp_path / 'parts' / 'ckpt.safetensors')
    assert net.step == 4 and config['fsdp']


def test_a_mistake_is_one_line_and_nothing_is_written(demo, tmp_path):
    out = tmp_path / 'out'
    for name in ('empty', 'v1'):
        (tmp_path / name / 'meta').mkdir(parents=True)
    (tmp_path / 'v1/meta/info.json').write_text(json.dumps(dict(codebase_version='v1.6', fps=10, features={})))
    (tmp_path / 'weights.safetensors').write_bytes(b'')
    safetensors.torch.save_file({'cls_token': torch.zeros(1, 1, 768)}, tmp_path / 'other.safetensors')
    for options, said in (
            (['--batch_sise=3'], '--batch_sise: no such option, did you mean --batch_size?'),
            (['--objective=flow'], '--objective: wants one of shortcut, diffusion, direct'),
            (['--tau_schedule=cosine'], '--tau_schedule: wants one of uniform, shift, logit-normal'),
            (['--space=z'], '--space: wants one of x, v'), (['--action_on=some'], '--action_on: wants one of all, token'),
            (['--time_every=1'], '--time_every=1: wants at least 2'), (['--context=-2'], '--context: wants 0 or more'),
            (['--long_share=0.5'], '--long_frames: wants 2 or more, got 0'),
            (['--memory=4'], '--memory=4: wants 2 to 3, less than a clip has --frames, and with --memory_frames=4'),
            (['--memory=1'], '--memory=1: wants 2 to 3, less'),
            (['--memory=3', '--memory_frames=1'], 'with --memory_frames=1 to go back beyond --context=4'),
            (['--memory_frames=0'], '--memory_frames: wants 1 or more, got 0'),
            (['--long_frames=8'], '--long_frames=8: wants --long_share'),
            (['--long_frames=7', '--long_share=0.5'], '--long_frames=7: 2.28571 clips a step in all do not divide'),
            (['--fsdp=True'], '--fsdp=True: wants torchrun'), (['--decay=2'], '--decay: wants 0 to 1, got 2.0'),
            (['--device=tpu'], '--device=tpu: not usable here'), (['--frames=1'], '--frames: wants 2 or more, got 1'),
            (['--p_image=2'], '--p_image: wants 0 to 1, got 2.0'), (['--K=3'], '--K=3: wants a power of two'),
            (['--k_max=1'], '--k_max=1: wants a power of two, 2 at least'), (['--seed=-1'], '--seed: wants 0 or more, got -1'),
            (['--heads=3', '--width=32'], '--width=32: wants a multiple of 4 x heads'),
            ([f'--labelled={tmp_path / "nowhere"}'], 'nowhere: no such folder'),
            ([f'--labelled={tmp_path}/empty'], 'not a LeRobot dataset: it has no meta/info.json'),
            ([f'--labelled={tmp_path}/v1'], 'wants codebase_version v2.0, v2.1 or v3.0'),
            ([demo[1].replace('--unlabelled', '--labelled')], 'has no actions'),
            (['--labelled=', '--unlabelled='], 'both empty'),
            (['--camera=wrist'], "has no camera 'wrist', only observation.images.top"),
            (['--state=torque'], '--state=torque: no labelled dataset has it; '),
            (['--state=observation.environment_state'], 'what a simulator knows or a robot was told, not what it senses'),
            (['--augment=0.5'], '--augment=0.5: wants --cache=False'),
            (['--state=observation.state', '--channels=1'], '--state=observation.state: 2 numbers, a token holds 1'),
            (['--action=torque'], "has no numeric 'torque' to be an action, only action"),
            (['--encoder=dinov2_vits15'], 'did you mean dinov2_vits14?'),
            (['--encoder=dinov2_vits14', f'--encoder_path={tmp_path / "none.pth"}'], 'none.pth: no such file'),
            (['--encoder=dinov2_vits14', f'--encoder_path={tmp_path / "weights.safetensors"}'],
             'cannot be read as weights'),
            (['--encoder=dinov2_vits14', f'--encoder_path={tmp_path / "other.safetensors"}'],
             'cls_token is (1, 1, 768), dinov2_vits14 wants (1, 1, 384)'),
            (['--frame_height=30'], '--frame_height=30: pixels with pool=1 wants a multiple of 7 pixels')):
        line = ends('train.py', *demo, *SMALL, f'--out_dir={out}', *options)
        assert said in line, line
        assert not out.exists()


def test_a_mistake_on_the_command_line_of_a_shell(tmp_path, monkeypatch, capfd):
    wanted = '--sede: no such option, did you mean --seed?'
    run = subprocess.run([sys.executable, str(ROOT / 'train.py'), '--sede=1'], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (1, '', wanted + '\n')
    monkeypatch.chdir(tmp_path)
    for name in ('plan.py', 'decode.py'):
        assert ends(name, '--sede=1') == wanted and capfd.readouterr() == ('', '')
    assert list(tmp_path.iterdir()) == []


def test_real_robot_video(shared, tmp_path):
    """Odd cameras, 26-dimensional actions, video without actions, real features."""
    script('train.py', f'--labelled={shared}/data/g1_v21', f'--unlabelled={shared}/data/wnoaction_v30',
           '--labelled_share=0.75', '--encoder=dinov2_vits14', '--frame_height=28',
           f'--encoder_path={shared}/weights/dinov2_vits14.safetensors', '--frameskip=6', '--cache=False',
           '--workers=0', '--max_steps=2', *SMALL, f'--out_dir={tmp_path / "o"}')
    net, config = model.load(tmp_path / 'o' / 'ckpt.safetensors')
    assert net.config['action_dim'] == 6 * 26 and net.config['dim'] == 384 and net.config['grid'] == [2, 2]
    assert entries(tmp_path / 'o')[1][-1]['val']['labelled']['model']['5'] > 0


def test_frames_with_latents_on_disk_are_not_encoded_again(shared, tmp_path, monkeypatch):
    given = (f'--labelled={shared}/data/w2cam_h264_v30', '--encoder=dinov2_vits14', '--frame_height=28', '--channels=8',
             f'--encoder_path={shared}/weights/dinov2_vits14.safetensors', f'--cache_dir={tmp_path}/latents', *SMALL,
             '--max_steps=1')
    first = script('train.py', *given, f'--out_dir={tmp_path}/a')['stats']
    monkeypatch.setattr(model.Encoder, 'forward', None)
    again = script('train.py', *given, f'--out_dir={tmp_path}/b')['stats']
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)


def test_other_rates_cameras_and_motions(tmp_path):
    """A robot with odd cameras, 26 actions of which a pose makes motions, and 30 frames a second of which 10 count."""
    rng = np.random.default_rng(0)
    x = {k: rng.integers(0, 255, (1, 24, 32, 3), np.uint8) for k in ('gripper.cam', 'überblick')}
    for name, keys in (('a', ('action',)), ('b', ())):
        write_lerobot(tmp_path / name, [{f'observation.images.{k}': np.repeat(v, 120, 0) for k, v in x.items()}
                                             | {k: rng.normal(size=(120, 26)) for k in keys} | {'task': 't'}
                                             for _ in range(3)], 30)
    options = (f'--labelled={tmp_path / "a"}:3', f'--unlabelled={tmp_path / "b"}', '--fps=10',
               '--action_mode=delta_tool', '--camera=cam:2,überblick', '--labelled_share=0.5',
               f'--out_dir={tmp_path / "o"}')
    g = script('train.py', *SMALL, *options, '--max_steps=2')
    net, config = model.load(tmp_path / 'o' / 'ckpt.safetensors')
    assert g['clips'].A == 2 * 26 and config['labelled'].endswith(':3.0') and net.stats['a_rows'].tolist() == [2]
    assert len(g['clips'].tokens) == 2 * 3 * 2 and g['clips'].sets[0].episodes[0].length == 40
    script('train.py', *SMALL, *options, '--max_steps=4', '--resume=True')
    assert '--fps' in ends('train.py', *SMALL, *options, '--fps=15', '--max_steps=6', '--resume=True')


def test_datasets_of_different_rates_are_told(tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 255, (30, 32, 32, 3), np.uint8)
    for name, keys, fps in ('a', ('action',), 10), ('b', (), 30):
        write_lerobot(tmp_path / name, [{'observation.images.top': x, 'task': 't'}
                                             | {key: np.ones((30, 2)) for key in keys} for _ in range(3)], fps)
    options = (*SMALL, f'--labelled={tmp_path / "a"}', f'--unlabelled={tmp_path / "b"}', '--max_steps=1',
               f'--out_dir={tmp_path / "o"}')
    assert 'give --fps' in ends('train.py', *options, '--frameskip=0')
    script('train.py', *options)
    assert 'lasts longer in some; --fps' in capsys.readouterr().out
    script('train.py', *options, '--fps=10', '--frameskip=0', f'--out_dir={tmp_path / "p"}')
    assert 'lasts longer' not in capsys.readouterr().out


def test_bad_episodes_stop_the_run_above_max_bad(demo, tmp_path, capfd):
    root = shutil.copytree(demo[0].partition('=')[2], tmp_path / 'd')
    path = root / 'videos/observation.images.top/chunk-000/file-000.mp4'
    os.truncate(path, path.stat().st_size * 5 // 6)
    options = (f'--labelled={root}', *SMALL, '--max_steps=20', '--cache=False', '--workers=0', '--val_share=0.2')      # which the fifth is not of
    line = ends('train.py', *options, f'--out_dir={tmp_path / "o"}')
    assert '--max_bad=0.01' in line and ' of 6 episodes' in line
    script('train.py', *options, '--max_bad=0.5', f'--out_dir={tmp_path / "o"}')
    assert capfd.readouterr().err.count('episode 5: skipped') == 2


def test_a_dataset_of_the_hub_is_pinned_in_the_checkpoint(demo, tmp_path, monkeypatch):
    shutil.copytree(demo[0].partition('=')[2], tmp_path / 'hub/me/robot')
    monkeypatch.setattr(data, 'HUB_HOME', str(tmp_path / 'kept'))
    options = ('--labelled=me/robot', *SMALL, '--cache=False', '--workers=1', f'--out_dir={tmp_path / "o"}')
    with Hub(tmp_path / 'hub') as hub:
        monkeypatch.setenv('HF_ENDPOINT', hub.url)
        script('train.py', *options, '--max_steps=2')
        pinned = f'me/robot@{hub.commit("me/robot")}'
        assert model.load(tmp_path / 'o' / 'ckpt.safetensors')[1]['labelled'] == pinned
        (tmp_path / 'hub/me/robot/README.md').write_text('a new revision')
        g = script('train.py', *options, '--max_steps=4', '--resume=True')
        assert g['clips'].sets[0].name == pinned and model.load(tmp_path / 'o' / 'ckpt.safetensors')[0].step == 4


def test_a_hub_that_is_away_ends_the_run_with_its_line(demo, tmp_path, monkeypatch):
    frames = data.LeRobot.frames

    def away(ds, episode, numbers, *rest):
        if len(numbers) > 1:        # not the first look
            raise data.Away('me/robot: not to be had: 503')
        return frames(ds, episode, numbers, *rest)
    monkeypatch.setattr(data.LeRobot, 'frames', away)
    for cache in True, False:
        assert ends('train.py', *demo, *SMALL, f'--cache={cache}', f'--out_dir={tmp_path}/o').startswith('me/robot: not to be had: 503')


def random_weights(name, path):
    """A file of an encoder that has learned nothing."""
    torch.manual_seed(0)
    vit = model.ViT(*model.ENCODERS[name][1:])
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.02)
    safetensors.torch.save_file({k: v.half() for k, v in vit.state_dict().items()}, path)
    return path


@pytest.mark.parametrize('name, arguments', [
    ('dinov2_tiny_cls', (64, 2, 2, 96, False, 4, 14, 37)), ('vjepa2_tiny', (64, 2, 2, 96, False, 0, 16, 2, 'vjepa2'))])
def test_other_encoders(tmp_path, demo, monkeypatch, capsys, name, arguments):
    """Trained on and gone on with; a frame of one token is decoded and planned with as well."""
    for known in ('dinov2_tiny', name):
        monkeypatch.setitem(model.ENCODERS, known, ('nobody/tiny', *arguments))
    weights, cls = random_weights(name, tmp_path / 'weights.safetensors'), name.endswith('_cls')
    options = (*demo, *SMALL, f'--encoder={name}', f'--encoder_path={weights}', f'--out_dir={tmp_path}/o',
               f'--frame_height={2 * arguments[6]}', f'--cache_dir={tmp_path}/latents')
    if cls:     # latents on disk of the same weights, but of patches
        script('train.py', *options, '--encoder=dinov2_tiny', '--max_steps=1')
        assert '--pool=2: dinov2_tiny_cls has one token' in ends('train.py', *options, '--pool=2')
    script('train.py', *options, f'--out_dir={tmp_path}/p', '--max_steps=2')
    script('train.py', *options, f'--out_dir={tmp_path}/p', '--max_steps=3', '--resume=True')
    net, config = model.load(tmp_path / 'p' / 'ckpt.safetensors')
    encoder = model.restore_encoder(config, net.stats, grid=net.config['grid'])
    assert net.step == 3 and net.config['grid'] == ([1, 1] if cls else [2, 2]) and encoder.hash == config['encoder_hash']
    ckpt = f'--ckpt={tmp_path}/p/ckpt.safetensors'
    if cls:
        script('decode.py', ckpt, '--rows=1', '--steps=2', '--train=True', '--lpips=0', '--train_steps=2', '--train_frames=8',
               '--channels=16', '--batch_size=4')
        assert 'PSNR, dB, through the decoder' in capsys.readouterr().out
        data.write_image(tmp_path / 'x.png', torch.randint(255, (3, 64, 64), dtype=torch.uint8))
        pictures = f'--start={tmp_path}/x.png', f'--goal={tmp_path}/x.png', '--samples=4', '--elites=2', '--iterations=1'
        script('plan.py', ckpt, *pictures, '--horizon=1', f'--out_dir={tmp_path}/plan')
        assert np.isfinite(np.load(tmp_path / 'plan' / 'plan.npy')).all()
        assert 'the one token of dinov2_tiny_cls has no places' in ends('plan.py', ckpt, *pictures, f'--mask={tmp_path}/x.png')


@pytest.mark.parametrize('preset, encoder', [('robot', 'dinov2_vits14'), ('thesis', 'dinov3_vitb16')])
def test_presets(tmp_path, demo, monkeypatch, preset, encoder):
    """Off the shelf but for size: the preset first, what the command line says after it."""
    repo, width, _, *rest = model.ENCODERS[encoder]
    monkeypatch.setitem(model.ENCODERS, encoder, (repo, width, 2, *rest))       # blocks
    weights = random_weights(encoder, tmp_path / 'weights.safetensors')
    side = 28 if preset == 'robot' else 32
    small = ('--width=32', '--layers=2', '--heads=2', '--kv_heads=1', '--batch_size=2', '--eval_clips=2', '--device=cpu',
             '--micro_batch=0', '--compile=False', '--max_steps=2', '--dtype=float32', '--workers=0', f'--frame_height={side}')
    g = script('train.py', *demo, *small, f'--preset={preset}', f'--encoder_path={weights}', f'--out_dir={tmp_path / "o"}')
    net, config = model.load(tmp_path / 'o' / 'ckpt.safetensors')
    wanted = g['PRESETS'][preset]
    assert config['preset'] == preset and config['encoder'] == wanted['encoder'] == encoder
    assert config['max_steps'] == 2 and config['frames'] == wanted['frames'] and config['k_max'] == 64
    assert config['frameskip'] == 2         # of 10 frames a second
    assert net.config['grid'] == ([1, 1] if preset == 'robot' else [2, 2])


@pytest.fixture(scope='module')
def worded(demo, tmp_path_factory):
    """Options for training on a demo world whose tasks differ, and the folder of a checkpoint of it."""
    folder = tmp_path_factory.mktemp('worded')
    source = data.LeRobot(demo[0].partition('=')[2])
    episodes = []
    for e in range(4):
        frames = source.frames(e, range(30)).permute(0, 2, 3, 1).numpy()
        task = ('push the disc left', 'reach')[e // 2]
        episodes.append({'observation.images.top': frames, 'action': source.rows(e)[:30], 'task': task})
    write_lerobot(folder / 'labelled', episodes, 10)
    write_lerobot(folder / 'unlabelled', [{k: v for k, v in e.items() if k != 'action'} for e in episodes], 10)
    options = (f'--labelled={folder}/labelled', f'--unlabelled={folder}/unlabelled', *SMALL, '--text=True', '--val_share=0.5',
               '--bootstrap_start=0.2', '--save_interval=3', '--eval_interval=3', '--log_interval=1')
    script('train.py', *options, '--max_steps=6', '--self_forcing=0.5', f'--out_dir={folder}/out')
    return options, folder / 'out'


def test_texts_are_seen_and_told_apart(worded, tmp_path, monkeypatch):
    """Evaluation tells what they are worth; the same bits after a restart; plans and pictures."""
    options, out = worded
    val = entries(out)[1][-1]['val']
    for kind, names in ('labelled', {'hidden', 'shuffled'}), ('unlabelled', set()):
        assert val[kind].keys() == {'model', 'repeat', 'no text', 'other text'} | names
        own = val[kind]['hidden' if kind == 'labelled' else 'model']
        assert len({own['5'], val[kind]['no text']['5'], val[kind]['other text']['5']}) == 3
    halt, save = tmp_path / 'half', model.save

    def keep(path, *rest):
        if os.path.isfile(tmp_path / 'again/optim.pt') and not halt.exists():
            shutil.copytree(tmp_path / 'again', halt)
        save(path, *rest)
    monkeypatch.setattr(model, 'save', keep)
    more = *options, '--max_steps=6', '--self_forcing=0.5'
    script('train.py', *more, '--micro_batch=2', f'--out_dir={tmp_path}/again')
    monkeypatch.setattr(model, 'save', save)
    script('train.py', *more, '--micro_batch=2', '--resume=True', f'--out_dir={halt}')
    a, b = (safetensors.torch.load_file(f / 'ckpt.safetensors') for f in (tmp_path / 'again', halt))
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    early, apart = ([e['flow'] for e in entries(f)[0][:3]] for f in (out, tmp_path / 'again'))
    assert early == pytest.approx(apart, rel=1e-4), 'clips keep their texts in micro-batches'
    assert '--text: False cannot go on' in ends('train.py', *more, '--text=False', '--resume=True', f'--out_dir={halt}')


def test_a_text_is_told_to_decode_and_plan(worded, trained, demo, tmp_path):
    _, out = worded
    ckpt = f'--ckpt={out}/ckpt.safetensors'
    looks = ckpt, f'--out_dir={tmp_path}/d', '--rows=2', '--steps=3', '--K=1'
    runs = [script('decode.py', *looks, *given)['imagined'] for given in (
        [], ['--actions=False'], ['--actions=False', '--text=reach'], ['--actions=False', '--guide=2'], ['--guide=1'])]
    assert torch.equal(runs[0], runs[4]) and all(not torch.equal(x, y) for x, y in itertools.combinations(runs[:4], 2))
    g = script('decode.py', *looks, '--unlabelled=' + demo[1].partition('=')[2], '--text=reach')
    assert bytes(g['words'][0]).rstrip(b'\0') == b'reach'
    search = ckpt, '--episodes=2', '--budget=2', '--samples=4', '--elites=2', '--iterations=1', '--blind_episodes=1', f'--out_dir={tmp_path}/p'
    for given in [], ['--text=reach'], ['--text=reach', '--guide=2'], ['--guide=2', '--method=adam']:
        script('plan.py', *search, *given)
    old = f'--ckpt={trained}/ckpt.safetensors'
    for name in 'decode.py', 'plan.py':
        assert '--text=reach: wants a model that was trained with --text=True' == ends(name, old, '--text=reach', f'--out_dir={tmp_path}/x')
        assert '--guide: wants 0 or more, got -1.0' == ends(name, ckpt, '--guide=-1', f'--out_dir={tmp_path}/x')
    assert not (tmp_path / 'x').exists()


def test_a_text_can_come_and_go_in_fine_tuning(worded, trained, tmp_path, demo, capfd):
    options, out = worded
    short = options[:2] + SMALL[4:] + ('--max_steps=1',)
    script('train.py', *short, f'--init={trained}/ckpt.safetensors', '--text=True', f'--out_dir={tmp_path}/o')
    assert model.load(tmp_path / 'o/ckpt.safetensors')[0].config['text']
    script('train.py', *short, f'--init={out}/ckpt.safetensors', f'--out_dir={tmp_path}/p')
    assert model.load(tmp_path / 'p/ckpt.safetensors')[1]['text'] is True
    script('train.py', *short, f'--init={out}/ckpt.safetensors', '--text=False', f'--out_dir={tmp_path}/q')
    assert not model.load(tmp_path / 'q/ckpt.safetensors')[0].config['text']
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    write_lerobot(tmp_path / 'silent', [{'observation.images.top': frames, 'action': np.zeros((4, 2)), 'task': ''}] * 2, 10)
    assert '--text=True: no episode of the datasets has a task in words' == ends(
        'train.py', f'--labelled={tmp_path}/silent', *SMALL, '--text=True', f'--out_dir={tmp_path}/r')
    assert not (tmp_path / 'r').exists()
    write_lerobot(tmp_path / 'long', [{'observation.images.top': frames + np.arange(64, dtype=np.uint8)[:, None], 'action': np.eye(4, 2), 'task': 150 * 'l'}] * 4, 10)
    script('train.py', f'--labelled={tmp_path}/long', *short[1:], '--unlabelled=', '--val_share=0.5', '--text=True', f'--out_dir={tmp_path}/s')
    assert capfd.readouterr().err.count('--text: tasks of more than 128 bytes are cut there') == 1


@pytest.fixture
def away(tmp_path, monkeypatch):
    """A hub that may be written to, from a folder of one's own."""
    constants = data.huggingface_hub.constants
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)      # the real hub's way for large files
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    monkeypatch.chdir(tmp_path)
    with Hub(tmp_path / 'hub') as hub:
        monkeypatch.setenv('HF_ENDPOINT', hub.url)
        yield hub


def test_a_checkpoint_goes_to_the_hub_and_comes_back(away, demo, tmp_path, monkeypatch, capsys):
    options = *demo, *SMALL, '--max_steps=2', '--out_dir=o', '--push=me/robot'
    away.fail('/lfs/', 403, method='PUT', times=1)
    line = ends('train.py', *options)
    assert 'ckpt.safetensors' in line and '--push wants' in line and '--resume=True' in line
    assert not (away.root / 'me/robot/ckpt.safetensors').exists()
    data.write_image('o/rollout.png', torch.zeros(3, 8, 8, dtype=torch.uint8))
    away.fail('/commit/', 503, method='POST')       # is asked again
    monkeypatch.setattr(data.time, 'sleep', lambda seconds: None)
    g = script('train.py', *options, '--resume=True', '--license=mit')
    assert 'pushed to me/robot' in capsys.readouterr().out
    there = away.root / 'me/robot'
    assert {p.name for p in there.iterdir()} == {'ckpt.safetensors', 'README.md', 'rollout.png'}, 'no log, no optimizer'
    mine = (tmp_path / 'o/ckpt.safetensors').read_bytes()
    assert (there / 'ckpt.safetensors').read_bytes() == mine
    card = (there / 'README.md').read_text()
    assert card.startswith('---\nlicense: mit\n') and '--ckpt=me/robot' in card
    error = entries(tmp_path / 'o')[1][-1]['val']['labelled']['model']
    assert f'| labelled | model | {error["1"]:.3f} | {error["5"]:.3f} |' in card and g['step'] == 2
    shutil.rmtree('o')

    monkeypatch.delenv('HF_TOKEN')
    script('decode.py', '--ckpt=me/robot', '--rows=1', '--steps=2', '--K=1')
    assert (tmp_path / 'me--robot/rollout.png').is_file()
    assert (tmp_path / 'me--robot/ckpt.safetensors').read_bytes() == mine
    revision = f'me/robot@{away.commit("me/robot")}'
    script('plan.py', f'--ckpt={revision}', '--episodes=2', '--blind_episodes=1', '--budget=2', '--samples=4', '--elites=2',
           '--iterations=1', '--horizon=2')
    assert (tmp_path / revision.replace('/', '--') / 'plan.json').is_file()
    g = script('train.py', *demo, *SMALL, '--max_steps=1', '--init=me/robot', '--out_dir=fine', '--learning_rate=0',
               '--min_lr=0')
    known = model.load('me--robot/ckpt.safetensors')[0].state_dict()
    assert all(torch.equal(v, g['model'].state_dict()[k]) for k, v in known.items())

    os.makedirs('me')           # a file here is not asked for elsewhere
    shutil.copy('me--robot/ckpt.safetensors', 'me/robot')
    away.log.clear()
    assert data.checkpoint('me/robot') == 'me/robot' and not away.log


def test_mistakes_with_the_hub(away, demo, tmp_path, monkeypatch):
    """Each is one line, before anything is trained or written."""
    options = *demo, *SMALL, '--max_steps=2', '--out_dir=o'
    for push in ('you/robot', 'me/ro bot', 'me/a--b', 'me/robot@v1'):
        line = ends('train.py', *options, f'--push={push}')
        assert line.startswith(f'{push}: ') and '--push wants owner/name and a token' in line, line
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    assert '401' in ends('train.py', *options, '--push=me/robot')
    (away.root / 'me/robot').mkdir(parents=True)
    (away.root / 'me/robot/README.md').write_text('mine')
    with monkeypatch.context() as patch:
        patch.setattr('huggingface_hub.constants.ENDPOINT', away.url)       # of what create_repo returns here
        patch.setenv('HF_TOKEN', READER)        # create_repo takes it for a repository that is there
        line = ends('train.py', *options, '--push=me/robot')
    assert line.startswith('me/robot: ') and '403' in line and '--push wants owner/name and a token' in line, line
    assert not os.path.exists('o')
    for name, words in (('me/none', '404'), ('me/none@v1', '404'), ('a--b/c', 'a--b/c: not to be had')):
        for command in (('decode.py', f'--ckpt={name}'), ('plan.py', f'--ckpt={name}'),
                        ('train.py', *options, f'--init={name}')):
            line = ends(*command)
            assert words in line and line.endswith('nor is there such a file here'), line
    assert 'not a readable checkpoint' in ends('decode.py', '--ckpt=out/ckpt.safetensors')
    away.__exit__()
    assert 'not to be had from the hub' in ends('decode.py', '--ckpt=me/robot')


WANDB = '''
runs = []
class Run:
    def __init__(self, **options):
        self.options, self.lines = options, []
    def log(self, entry, step):
        self.lines.append((step, entry))
def login():
    if refused:
        raise ValueError(refused)
def init(**options):
    runs.append(Run(**options))
    return runs[-1]
'''


def test_wandb_gets_what_the_log_does(demo, tmp_path, monkeypatch):
    options = *demo, *SMALL, '--log_interval=1', f'--out_dir={tmp_path}/o', '--wandb=project'
    monkeypatch.setitem(sys.modules, 'wandb', None)         # as where it is not installed
    assert '--wandb=project: wants: pip install wandb' in ends('train.py', *options, '--max_steps=2')
    assert not (tmp_path / 'o').exists()
    monkeypatch.delitem(sys.modules, 'wandb')
    (tmp_path / 'wandb.py').write_text('refused = "No API key"' + WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    assert ends('train.py', *options, '--max_steps=2').endswith('(ValueError: No API key)') and not (tmp_path / 'o').exists()
    sys.modules['wandb'].refused = ''
    script('train.py', *options, '--max_steps=2')
    script('train.py', *options, '--max_steps=4', '--resume=True')
    script('train.py', *options, '--max_steps=1')           # another run
    first, again, other = (run.options for run in sys.modules['wandb'].runs)
    assert first['project'] == 'project' and first['resume'] == 'allow' and first['config']['max_steps'] == 2
    assert first['id'] == again['id'] != other['id']
    logged = [entry for run in sys.modules['wandb'].runs[:2] for _, entry in run.lines]
    written = [json.loads(line) for line in (tmp_path / 'o.1/log.jsonl').read_text().splitlines()]
    assert logged == written and {'val', 'loss'} <= {key for entry in logged for key in entry}
    assert all(step == entry['step'] for run in sys.modules['wandb'].runs for step, entry in run.lines)
    monkeypatch.delitem(sys.modules, 'wandb')
