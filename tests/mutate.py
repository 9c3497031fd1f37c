"""
Puts faults into the code, one at a time, and tells which of them no test finds.

    python tests/mutate.py                          # all, a quarter of an hour
    python tests/mutate.py --only=plan.py --jobs=2

Each is tried on a copy of the project, by the few tests that should find it, and only if these pass
without it. A survivor is a test that is missing: exit code 1.
"""
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

# what the tests import, once for all: every mutation is tried in a fork of this process
import av  # noqa: F401
import pyarrow.parquet  # noqa: F401
import pytest
import torch.nn.attention.flex_attention  # noqa: F401

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..')
sys.path.insert(0, ROOT)
import data  # noqa: E402, from the root

# --------------------------------------------------------------------------------------------------
only = ''       # mutations of which the text or the tests hold this; '' = all
jobs = 1        # mutations tried at once, with one thread each
limit = 300     # seconds; what has not ended by then is found
config = data.override(globals(), sys.argv[1:])
# --------------------------------------------------------------------------------------------------

# a file, a text that is in it once, what takes its place, tests: a file and a part of their names
MUTATIONS = [

    # encoders
    ('model.py', 'torch.stack((-x[..., 1::2], x[..., ::2])', 'torch.stack((-x[..., ::2], x[..., 1::2])',
     'test_model.py library_that_made'),
    ('model.py', 'angles.repeat(1, 1, 2)', 'angles.repeat_interleave(2, dim=2)',
     'test_model.py library_that_made'),
    ('model.py', "'tanh' if family == 'siglip2'", "'none' if family == 'siglip2'",
     'test_model.py library_that_made'),
    ('model.py', "antialias=self.family == 'dino')", 'antialias=True)',
     'test_model.py library_that_made'),
    ('model.py', 'patch.float().sum(2)', 'patch.sum(2)',
     'test_model.py files_of_vjepa2'),
    ('model.py', "self.cls = name.endswith('_cls')", 'self.cls = False',
     'test_model.py class_token'),
    ('model.py', "if vit.family == 'siglip2':\n            moments", "if False:\n            moments",
     'test_model.py frames_are_resized'),

    # attention and the model
    ('model.py', 'x.roll(x.shape[-1] // 2, dims=-1)', 'x.roll(1, dims=-1)',
     'test_model.py rope_of_space'),
    ('model.py', 'torch.cat((-sin, sin), dim=-1)', 'torch.cat((sin, -sin), dim=-1)',
     'test_model.py library_that_made'),
    ('model.py', '.reshape(B, n, h // n * S, d)',
     '.unflatten(1, (-1, n)).transpose(1, 2).reshape(B, n, h // n * S, d)',
     'test_model.py attention_written_out'),
    ('model.py', 'logits = cap * torch.tanh(', 'logits = cap * (',
     'test_model.py attention_written_out'),
    ('model.py', '(ago < context)\n', '(ago <= context)\n',
     'test_model.py nor_beyond_the_window'),
    ('model.py', '(ago < reach)', '(ago <= reach)',
     'test_model.py so_manyth_frame'),
    ('model.py', '(then - first) % every', 'then % every',
     'test_model.py so_manyth_frame'),
    ('model.py', 'in_sight(t[i], t[j], context, memory) if memory else in_sight', 'in_sight',
     'test_model.py so_manyth_frame'),
    ('model.py', 't[-L:] % L', '(t[-L:] + 1) % L',
     'test_model.py the_cache_changes_nothing'),
    ('model.py', 'new[:, :, -L:]', 'new[:, :, :L]',
     'test_model.py the_cache_changes_nothing'),
    ('model.py', 'mask = slots <= start', 'mask = slots < start',
     'test_model.py frame_number_in_a_tensor'),
    ('model.py', 'mask &= k[0, 0].any(dim=1)', 'k[0, 0].any(dim=1)',
     'test_model.py remembers_what_it_is_given'),
    ('model.py', 'device=self.time_freq.device) + start', 'device=self.time_freq.device)',
     'test_model.py the_cache_changes_nothing'),
    ('model.py', "t * self.config['memory'] + self.first", "t * self.config['memory']",
     'test_model.py stand_for_a_clip'),
    ('model.py', 't = t.repeat_interleave(group)', 't = t.repeat(group)',
     'test_model.py flat_tokens_see_their_frame'),
    ('model.py', 'alone.repeat_interleave(group, dim=1)', 'alone.repeat(1, group)',
     'test_model.py stand_for_a_clip'),
    ('model.py', 'i, j = i // group, j // group', 'j = j // group',
     'test_model.py flex_attention_and_remat'),
    ('model.py', 'odd = torch.arange(len(self.time_freq), device=t.device) % 2 > 0',
     'odd = torch.arange(len(self.time_freq), device=t.device) % 2 >= 0',
     'test_model.py flat_rope'),
    ('model.py', "i % c['time_every'] == 1", "i % c['time_every'] == 0",
     'test_model.py sizes_and_a_new_model'),
    ('model.py', 'self.a_in(torch.where(a_mask[..., None], a, 0.0))', 'self.a_in(a)',
     'test_model.py do_not_leak[plain'),
    ('model.py', "slice(c['registers'], c['registers'] +",
     "slice(c['registers'] + 1, c['registers'] + 1 +",
     'test_model.py what_went_in'),
    ('model.py', 'd_i = (-torch.log2(d)).round().long()',
     'd_i = 0 * (-torch.log2(d)).round().long()',
     'test_model.py told_apart'),
    ('model.py', '.float() / 255).float())', '.float() / 256).float())',
     'test_model.py frames_are_encoded'),
    ('model.py', 'self.blocks[:layer % len(self.blocks) + 1]',
     'self.blocks[:layer % len(self.blocks)]',
     'test_model.py layer_is_that_blocks'),

    # the objective
    ('model.py', 'torch.sigmoid(x - math.log(shift))', 'torch.sigmoid(x + math.log(shift))',
     'test_model.py signal_levels'),
    ('model.py', 'n = (first + B) * share // 1000 - first * share // 1000', 'n = B * share // 1000',
     'test_model.py share_of_bootstrap'),
    ('model.py', 'now = first + (noise.now * (T - first)).floor()', 'now = (noise.now * T).floor()',
     'test_model.py past_of_a_share'),
    ('model.py', 'first = 1 + o.memories', 'first = 1',
     'test_model.py the_past_is_all_of_them'),
    ('model.py', 'alone = alone[:, None] | ~z_mask', 'alone = alone[:, None] & z_mask',
     'test_model.py are_no_targets'),
    ('model.py', 'alone = ~z_mask if o.memories else None', 'alone = None',
     'test_model.py are_no_targets'),
    ('model.py', "        memories += 1\n", "        memories += 0\n",
     'test_model.py direct_is_one_step'),
    ('model.py', 'past = (noise.past < o.p_past)', 'past = (noise.past > o.p_past)',
     'test_model.py past_of_a_share'),
    ('model.py', 'e = 1 + (noise.d *', 'e = (noise.d *',
     'test_model.py step_sizes_are_equally'),
    ('model.py', '(tau / d).floor() * d', '(tau / d).round() * d',
     'test_model.py step_sizes_are_equally'),
    ('model.py', '(1 - level) * noise.eps + level * z', 'level * noise.eps + (1 - level) * z',
     'test_model.py equation_7'),
    ('model.py', 'middle = z_tau + first * half', 'middle = z_tau + first * d',
     'test_model.py equation_7'),
    ('model.py', 'velocity(model, middle, tau + half,', 'velocity(model, middle, tau,',
     'test_model.py equation_7'),
    ('model.py', '(first + second) / 2', '(first + second)',
     'test_model.py equation_7'),
    ('model.py', '@torch.no_grad()\ndef bootstrap_target', 'def bootstrap_target',
     'test_model.py teacher'),
    ('model.py', '0.9 * tau + 0.1', '0.1 * tau + 0.9',
     'test_model.py equation_7'),
    ('model.py', 'weight / (1 - tau) ** 2', 'weight / (1 - tau)',
     'test_model.py equation_7'),
    ('model.py', 'a_mask = a_mask & ~alone[:, None]', 'a_mask = a_mask',
     'test_model.py shares_are_kept'),
    ('model.py', 'a_mask & (noise.null >= o.p_null)', 'a_mask & (noise.null < o.p_null)',
     'test_model.py shares_are_kept'),
    ('model.py', '(error * mask).sum()', 'error.sum()',
     'test_model.py padded_frames'),
    ('model.py', 'tau[:, memories] = 0', 'tau[:, -1] = 0',
     'test_model.py direct_is_one_step'),
    ('model.py', '[rms[name] for name in names]).amax()', '[rms[name] for name in names]).amin()',
     'test_model.py equation_7'),

    # imagination
    ('model.py', '-out_of_sight:-every][::-1]', '-out_of_sight:-every]',
     'test_model.py remembers_what_it_is_given'),
    ('model.py', 'gone[-every:-out_of_sight', 'gone[-1:-out_of_sight',
     'test_model.py remembers_what_it_is_given'),
    ('plan.py', '[-self.model.reach - 1:]', '[-self.model.reach:]',
     'test_plan.py search_remembers'),
    ('plan.py', 'mean, carried, self.tokens, self.gone)', 'mean, carried, self.tokens)',
     'test_plan.py search_remembers'),
    ('decode.py', 'graph=False, gone=gone,', 'graph=False,',
     'test_decode.py a_dream_remembers'),
    ('data.py', 'bool(steps <= most)', 'True',
     'test_data.py memories_of_a_batch'),
    ('data.py', 'max(0, start - steps * self.frameskip)', 'max(0, start - steps)',
     'test_data.py memories_of_a_batch'),
    ('train.py', 'normalised(batch, P + T)', 'normalised(batch, T)',
     'test_train.py what_remembers_learns'),
    ('train.py', 'range(memory, memory * memory_frames, memory or 1)', 'range(memory, 3 * memory, memory or 1)',
     'test_train.py what_remembers_learns'),
    ('model.py', "min(round(tau_ctx * c['k_max']), c['k_max'] - 1)", "round(tau_ctx * c['k_max'])",
     'test_model.py noised_and_labelled'),
    ('model.py', 'past = s.tau_ctx * z + (1 - s.tau_ctx) * eps', 'past = z + 0 * eps',
     'test_model.py noised_and_labelled'),
    ('model.py', 'level * z_ctx + (1 - level) * eps', '(1 - level) * z_ctx + level * eps',
     'test_model.py noised_and_labelled'),
    ('model.py', '(z_hat - z) / (s.K - k)', '(z_hat - z) / s.K',
     'test_model.py the_cache_changes_nothing'),
    ('model.py', 'level(k / s.K), level(s.d)', 'level(k / s.K), level(s.d_ctx)',
     'test_model.py the_cache_changes_nothing'),
    ('model.py', 'a[::M, :Tc]', 'a[:B, :Tc]',
     'test_model.py candidates_share'),
    ('model.py', 'noise.repeat_interleave(M, dim=1))', 'noise.repeat(1, M, 1, 1, 1))',
     'test_model.py candidates_share'),
    ('model.py', "s.grad == 'all' or s.grad and k == s.K - 1", 'bool(s.grad)',
     'test_model.py gradient_of_a_rollout'),

    # the checkpoint
    ('model.py', 'tensors | averages if ema else tensors', 'averages | tensors if ema else tensors',
     'test_model.py save_then_load'),
    ('model.py', "aside = f'{path}.tmp'", 'aside = path',
     'test_model.py save_that_is_killed'),
    ('model.py', 'os.chmod(aside, mode)', 'pass',
     'test_model.py save_then_load'),
    ('model.py', 'f.get_tensor(k).clone()', 'f.get_tensor(k)',
     'test_model.py save_then_load'),
    ('model.py', "known not in ('', encoder.hash)", 'False',
     'test_model.py another_encoder'),
    ('model.py', "'student.' not in key", "'student.' in key",
     'test_model.py split_files'),
    ('decode.py', 'number = robot if labelled else i', 'number = i',
     'test_decode.py robot_named'),
    ('decode.py', "of = f'{encoder.name} {encoder.hash[:9]} {encoder.layer}", "of = f'{encoder.name}",
     'test_decode.py decoder_is_trained'),
    ('plan.py', '.clamp(min=1)      # 1.0', '.clamp(1, 1)      # 1.0',
     'test_plan.py rare_and_large'),
    ('model.py', "return z + stats['z_mean']", "return z - stats['z_mean']",
     'test_model.py normalised_and_back'),

    # videos and tables
    ('data.py', 'yield frame, (now + then) / 2 - start, rate', 'yield frame, now - start, rate',
     'test_data.py variable_frame_rate'),
    ('data.py', "settings['frames'] = [e.usable for e in ds.episodes]", 'pass',
     'test_data.py begin_elsewhere'),
    ('data.py', 'return self.words[int(numbers[self._at(j), 0])]', 'return e.tasks[0]',
     'test_data.py several_tasks'),
    ('data.py', 'for key in demos[0]:', 'for key in rows:',
     'test_data.py other_orders'),
    ('data.py', 'if weight == 0:', 'if False:',
     'test_data.py shared_out_by'),
    ('data.py', "array.array('q', sorted(times))", "array.array('q', times)",
     'test_data.py frame_i_is'),
    ('data.py', 'any(i < number and i not in self.fed for i in wanted)', 'False',
     'test_data.py frames_equal_sequential'),
    ('data.py', "chunk = i // (self.info.get('chunks_size') or 1000)", 'chunk = 0',
     'test_data.py as_many_episodes'),
    ('data.py', 'np.searchsorted(times, start - 0.5 / self.native)',
     'np.searchsorted(times, start)', 'test_data.py to_timestamp_is_not'),
    ('data.py', 'abs(length[worst] - room[worst]) > ', 'length[worst] - room[worst] > 99 + ',
     'test_data.py places_in_a_shared'),
    ('data.py', "if rows['odd']:\n            shown", "if False:\n            shown",
     'test_data.py the_frame_of_a_row'),
    ('data.py', 'widths == width', 'widths > 0', 'test_data.py another_width'),
    ('data.py', " + (parts['mean'] - out['mean']) ** 2)", ')',
     'test_data.py test_stats'),
    ('data.py', "rows = np.flatnonzero(columns['episode_index'] == e.index)",
     'rows = e.index * e.stated + np.arange(e.stated)',
     'test_data.py many_shards'),
    ('data.py', '(2 * np.asarray(j) * over + under) // (2 * under)',
     'np.asarray(j) * over // under',
     'test_data.py lower_rate'),
    ('data.py', "i = at if key.startswith('observation') else at - 1", 'i = at',
     'test_data.py deltas_of_a_dataset'),
    ('data.py', 'R1 @ R0.swapaxes(1, 2)', 'R0.swapaxes(1, 2) @ R1',
     'test_data.py the_delta_leads'),
    ('data.py', 'return z @ y @ x', 'return x @ y @ z',
     'test_data.py the_delta_leads'),
    ('data.py', 'r = np.roll(r, 1, axis=1)', 'r = np.roll(r, -1, axis=1)',
     'test_data.py the_delta_leads'),
    ('data.py', "from_timestamp': self.first / self.fps", "from_timestamp': self.total / self.fps",
     'test_data.py frames_and_rows_of_several'),
    ('data.py', 'self.tmp = own_tmp(self.root)', 'self.tmp = self.root',
     'test_data.py bad_episode_leaves_nothing'),
    ('data.py', 'fcntl.LOCK_EX | fcntl.LOCK_NB', 'fcntl.LOCK_SH | fcntl.LOCK_NB',
     'test_data.py one_owner'),
    ('data.py', "if not os.path.exists(f'{left}/meta/info.json'):", 'if True:',
     'test_data.py two_writers'),
    ('data.py', "BytesIO(content), STRICT)", "BytesIO(content), SAFE)",
     'test_data.py hostile_pictures'),
    ('data.py', 'MIRRORED.search(content[:1 << 16])', 'False',
     'test_data.py turned_as_viewers'),
    ('data.py', 'FIELD.sub(lambda field: format(values[field[1]], field[2] or \'\'), template)',
     'template.format(**values)',
     'test_data.py test_refused'),
    ('data.py', 'size is None or f.tell() > size', 'size is not None and f.tell() > size',
     'test_data.py mirror_that_says_less'),
    ('data.py', 'resume_size=f.tell()', 'resume_size=0',
     'test_data.py killed_download'),

    # clips and batches
    ('data.py', 'self.rows(episode)[start:f[real - 1]]',
     'self.rows(episode)[start + 1:f[real - 1] + 1]',
     'test_data.py pins_actions'),
    ('data.py', 'a_mask[1:real] = np.isfinite(a[1:real])', 'a_mask[:real] = np.isfinite(a[:real])',
     'test_data.py pins_actions'),
    ('data.py', 'np.isfinite(a[1:real]).all(1) & (self.action_dim > 0)', 'self.action_dim > 0',
     'test_data.py not_numbers_are_masked'),
    ('data.py', 'z_mask = f < e.length', 'z_mask = f <= e.length',
     'test_data.py pins_actions'),
    ('data.py', "torch.from_numpy(ds.stats['mean'])",
     "torch.from_numpy(self.labelled[0].stats['mean'][:ds.action_dim])",
     'test_data.py normalised_padded'),
    ('data.py', "(clip['a'] - mean) / std", "((clip['a'] - mean) / std).clamp(-5, 5)",
     'test_data.py normalised_padded'),
    ('data.py', 'sum(weights[s:kind.stop])', 'sum(weights[kind.start:kind.stop])',
     'test_data.py ranks_together'),
    ('data.py', 'order.count / exact_rate(ds.fps)', 'order.count',
     'test_data.py by_duration_or_weight'),
    ('data.py', 'p=weights / weights.sum()', 'p=None',
     'test_data.py drawn_by_weight'),
    ('data.py', 'sorted({*range(len(indices))} - {*val}), val', '[*range(len(indices))], val',
     'test_data.py in_both_splits'),
    ('data.py', 'begin = self.rank * self.batch_size\n        return', 'begin = 0\n        return',
     'test_data.py ranks_together'),
    ('data.py', 'windows = max(1, ds.episodes[e].length - (T - 1) * frameskip)',
     'windows = max(1, ds.episodes[e].length - T * frameskip)',
     'test_data.py ranks_together'),
    ('data.py', 'np.random.default_rng((*self.seed, epoch, block)).shuffle(i)', 'pass',
     'test_data.py well_mixed'),
    ('data.py', 'return self.short, step - number', 'return self.short, step',
     'test_data.py long_clips_come'),
    ('data.py', "('low', 'min'), ('high', 'max')", "('low', 'max'), ('high', 'min')",
     'test_data.py normalised_padded'),

    # the projection
    ('model.py', "stats.get('z_back', stats['z_basis'].T)", "stats['z_basis'].T",
     'test_train.py learned_projection'),
    ('train.py', "stats['align.token.weight'] *= std", 'pass',
     'test_train.py aligned_latents'),
    ('train.py', 'back = (back.detach() * size).contiguous()', 'back = back.detach().contiguous()',
     'test_train.py learned_projection'),
    ('train.py', 'aligned(imagined[:, :, :N])', 'aligned(z[:, forced:, :N])',
     'test_train.py imagined_frames'),
    ('train.py', 'aligned.code(p[i:i + few, forced:])', 'aligned.code(p[:few, forced:])',
     'test_train.py imagined_frames'),
    ('model.py', 'masked_fill(near & ~own, -torch.inf)', 'masked_fill(near & False, -torch.inf)',
     'test_model.py contrast'),
    ('model.py', 'F.cross_entropy(logits.T, target)', 'F.cross_entropy(logits, target)',
     'test_model.py contrast'),

    # playing, the report, words
    ('decode.py', "self.headers.get('Origin', page) != page", 'False',
     'test_decode.py other_sites'),
    ('decode.py', 'if not 0 <= length <= MOST:', 'if length > MOST:',
     'test_decode.py changes_nothing'),
    ('decode.py', 'a_mask[:, 0] = False        # what led', 'a_mask[:, 0] &= True        # what led',
     'test_decode.py a_step_is_the_models'),
    ('decode.py', '[-context - model.reach - UNDO:]', '[-context:]',
     'test_decode.py long_dream'),
    ('decode.py', 'planner = copy(world.planner)', 'planner = world.planner',
     'test_decode.py with_words'),
    ('decode.py', '190 - 180 * y / high', '180 - 180 * y / high',
     'test_decode.py a_curve'),
    ('decode.py', 'noise.null[:] = 1  ', 'pass  ',
     'test_decode.py signal_level'),
    ('decode.py', 'keep_blank_values=True', 'keep_blank_values=False',
     'test_decode.py with_words'),
    ('decode.py', 'noise.tau[:] = i / 8', 'noise.tau[:] = (i + 1) / 8',
     'test_decode.py signal_level'),
    ('model.py', 'action[1::2] = self.a_base', 'pass',
     'test_model.py guid'),

    # the state and the probe
    ('model.py', 'known.sum(dim=2).clamp(min=1)', 'off.shape[2]',
     'test_model.py error_of_a_state'),
    ('model.py', 'hidden = (noise.null >= o.p_null) & ', 'hidden = ',
     'test_model.py state_of_some_clips'),
    ('data.py', '(self.seed, step, i, 100)', '(self.seed, step, i % self.batch_size, 100)',
     'test_data.py seen_otherwise'),
    ('data.py', 'saturation * (turn - grey)', 'turn - grey',
     'test_data.py seen_otherwise'),
    ('data.py', 'if but and part == key:', 'if but:',
     'test_data.py what_a_probe_reads'),
    ('data.py', 'self.columns = [*dict.fromkeys(self.action_keys + sensed)]',
     'self.columns = [*self.action_keys, *sensed, *(k for k, _ in self.probe_numbers)]',
     'test_data.py what_a_probe_reads'),
    ('data.py', 'now / std, 0 * now', 'now / std, 0 * now + 1',
     'test_data.py states_of_a_batch'),
    ('data.py', 'np.nanvar(changes, 0)', 'np.nanvar(states, 0)',
     'test_data.py states_of_a_batch'),
    ('model.py', 'short = (off + half) % self.turn - half', 'short = off',
     'test_model.py numbers_and_angles'),
    ('model.py', 'torch.atan2(first, second)', 'torch.atan2(second, first)',
     'test_model.py numbers_and_angles'),
    ('train.py', '(std > 1e-6) & std.isfinite()', 'std > -1',
     'test_train.py probe_leaves_out'),
    ('train.py', 'turn = torch.tensor([full_turn(name) for name in names], device=device)',
     'turn = 0 * std[which]',
     'test_train.py probe_leaves_out'),
    ('plan.py', 'np.nansum(np.square(off), axis=1)', 'np.nansum(np.square(off[:, :1]), axis=1)',
     'test_plan.py is_there_rests'),
    ('plan.py', '            still = np.nan_to_num(now)\n', '            pass\n',
     'test_plan.py is_there_rests'),
    ('plan.py', "torch.where(self.s_std > 1e-6, self.s_std, torch.inf)", '1',
     'test_plan.py told_the_state'),
    ('model.py', 'state = state_weight * model', 'state = model',
     'test_plan.py weighs_as_much'),

    # latents on disk
    ('data.py', 'v.abs().amax(1, keepdim=True)', 'v.abs().mean(1, keepdim=True)',
     'test_data.py cached_latents_are'),
    ('data.py', "rows['z'] * rows['scale'][:, None]", "rows['z'] * rows['scale'][:1, None]",
     'test_data.py latents_of_its_own'),
    ('data.py', 'weights=weights.hexdigest()', "weights=''",
     'test_data.py cache_of_other_frames'),
    ('data.py', 'found.update(f.read(PROBE))', 'pass',
     'test_data.py fingerprint_is_of'),
    ('data.py', 'np.minimum(np.arange(T), real - 1) * self.frameskip',
     'np.minimum(np.arange(T), real - 1)',
     'test_data.py latents_of_its_own'),
    ('data.py', "with open(tmp, 'wb') as f:", "with open(f'{path}.npy', 'wb') as f:",
     'test_data.py goes_on_where_it_was_killed'),
    ('data.py', 'not least <= value <= most', '(value < least or value > most)',
     'test_data.py override_refuses'),

    # training
    ('train.py', "rms = dict(zip(rms, left['rms'].to(device).view(3)))", 'rms = dict(rms)',
     'test_train.py resume_is_bitwise[True]'),
    ('train.py', 'ema_model.load_state_dict(load(ckpt)[0].state_dict())', 'pass',
     'test_train.py resume_is_bitwise[True]'),
    ('train.py', "    step = left['step']\n", '    step = 0\n',
     'test_train.py resume_is_bitwise[True]'),
    ('train.py',
     "optimizer.load_state_dict(optimizer.state_dict() | dict(state=left['optimizer']['state']))",
     'pass',
     'test_train.py resume_is_bitwise[True]'),
    ('train.py', 'sampler=range(step, max_steps)', 'sampler=range(max_steps - step)',
     'test_train.py resume_is_bitwise[True]'),
    ('train.py', "if os.path.isfile(optim + '.new') and not", 'if False and not',
     'test_train.py between_two_renames'),
    ('train.py', "journal.truncate(int(min(left['log'], journal.tell())))", 'pass',
     'test_train.py resume_is_bitwise[True]'),
    ('train.py', "augment datasets camera", "augment camera",
     'test_train.py may_have_moved_but'),
    ('train.py', 'if skipped < skip_nonfinite and not finite:', 'if False:',
     'test_train.py may_be_skipped'),
    ('train.py', 'if len(a) > 1:', 'if True:',
     'test_train.py shuffled_actions_are'),
    ('train.py', 'worker_init_fn=lambda _: os.setpgrp()', 'worker_init_fn=None',
     'test_train.py a_signal_saves'),
    ('train.py', 'weights.pop(name, None)', 'pass',
     'test_train.py begins_with_another'),
    ('train.py', 'rate * (step + 1) / warmup', 'rate * step / warmup',
     'test_train.py rate_warms_up'),
    ('train.py', 'min(decay * end, end - warmup)', 'end - warmup',
     'test_train.py rate_warms_up'),
    ('train.py', "        group['lr'] = get_lr(step, group['rate'], group['end'])\n", '        pass\n',
     'test_train.py what_the_optimizer_is_given'),
    ('train.py', '1 - min(ema, (step + 1) / (step + 10))', 'min(ema, (step + 1) / (step + 10))',
     'test_train.py what_the_optimizer_is_given'),
    ('train.py', 'noise=clip_noise(z, seeds), count=count, clip_weight', 'noise=clip_noise(z, seeds), clip_weight',
     'test_train.py how_a_batch_is_split'),
    ('train.py', 'first=first + i', 'first=first',
     'test_train.py how_a_batch_is_split'),
    ('train.py', 'hash((seed, step, row + j))', 'hash((seed, step, j))',
     'test_train.py how_a_batch_is_split'),
    ('train.py', 'clip_grad_norm_(part, grad_clip or math.inf)',
     'clip_grad_norm_(part, math.inf)',
     'test_train.py optimizer_is_given'),
    ('train.py', 'dict(params=others, weight_decay=0.0',
     'dict(params=others, weight_decay=0.1',
     'test_train.py optimizer_is_given'),
    ('train.py', 'if step >= bootstrap_start * awake else 0.0', 'if True else 0.0',
     'test_train.py optimizer_is_given'),
    ('train.py', 'a.roll(len(a) // 2, 0), a_mask', 'a, a_mask',
     'test_train.py leaves_behind'),
    ('train.py', 'error[real, h - 1].mean()', 'error[:, h - 1].mean()',
     'test_train.py in_an_evaluation'),
    ('train.py', '2 << int(', '4 << int(',
     'test_train.py clips_grow'),
    ('train.py', '        dist.all_reduce(total)\n', '        pass\n',
     'test_train.py how_a_batch_is_split'),

    # the search
    ('plan.py', 'largest=False', 'largest=True',
     'test_plan.py optimum_of_each'),
    ('plan.py', 'return actions.clamp(low, high)', 'return actions',
     'test_plan.py bounds_hold'),
    ('plan.py', 'actions.data.clamp_(low, high)', 'pass',
     'test_plan.py bounds_hold'),
    ('plan.py', ' / kernel.norm()', '',
     'test_plan.py unit_variance'),
    ('plan.py', 'f ** (-beta / 2)', 'f ** -beta',
     'test_plan.py unit_variance'),
    ('plan.py', 'int(o.samples / 1.25 ** i)', 'int(o.samples / 1.25)',
     'test_plan.py update_rule'),
    ('plan.py', 'elites[:, :math.ceil(o.keep * o.elites)]', 'elites',
     'test_plan.py update_rule'),
    ('plan.py', '-regret / o.temperature', '-regret * o.temperature',
     'test_plan.py update_rule'),
    ('plan.py', 'if now + (now - begun) / (i + 1) > deadline', 'if now > deadline',
     'test_plan.py time_budget'),
    ('plan.py', 'z = z[:, :, -1:]', 'z = z[:, :, :1]',
     'test_plan.py cost_of_a_plan'),
    ('plan.py', ' * known[:, None, None, None]', '',
     'test_plan.py cost_of_a_plan'),
    ('plan.py', 'noise = hash((seed, i, s)) % 2 ** 31', 'noise = hash((seed, i)) % 2 ** 31',
     'test_plan.py candidates_of_an_iteration'),
    ('model.py', 'weight = weight / weight.mean()', 'weight = 1 / weight',
     'test_plan.py cost_of_a_plan'),

    # the controller
    ('plan.py', 'a.cpu() * self.a_std + self.a_mean', 'a.cpu() * self.a_std',
     'test_plan.py what_the_search_is_given'),
    ('plan.py', '(rows - self.a_mean) / self.scale', 'rows / self.scale',
     'test_plan.py what_the_search_is_given'),
    ('plan.py', 'F.pad(self.last_plan[:, o.replan:], (0, 0, 0, o.replan))', 'self.last_plan',
     'test_plan.py begins_from_the_last'),
    ('plan.py', 'self.last_elites[:, :, o.replan:]', 'self.last_elites',
     'test_plan.py begins_from_the_last'),
    ('plan.py', 'slice(n - self.past, None, self.frameskip)', 'slice(0, None, self.frameskip)',
     'test_plan.py what_the_search_is_given'),
    ('plan.py', 'self.known[:, 0] = False', 'self.known[:, 0] = True',
     'test_plan.py what_the_search_is_given'),
    ('plan.py', 'self.done[-1] = actions', 'pass',
     'test_plan.py what_the_search_is_given'),

    # the closed loop
    ('plan.py', 'end = reached[-1]', 'end = reached.any(axis=0)',
     'test_plan.py score_of_what'),
    ('plan.py', 'reached.argmax(axis=0)[ever]', 'reached.argmax(axis=0)',
     'test_plan.py score_of_what'),
    ('plan.py', 'k * (n - k) / n + z * z / 4', 'k * (n - k) / n',
     'test_plan.py wilson'),
    ('plan.py', 'for t in range(budget + 1):', 'for t in range(budget + 2):',
     'test_plan.py what_a_policy_sees'),
    ('plan.py', 'o.budget or 2 * o.goal_steps', '2 * o.goal_steps',
     'test_plan.py leaves_its_report'),
    ('plan.py', 'states[-past:], between', 'states[:past], between',
     'test_plan.py test_questions'),
    ('plan.py', 'actions[lead - past + 1:]', 'actions[:past - 1]',
     'test_plan.py test_questions'),
    ('plan.py', "writer.add(frame, columns.pop('action'), sim.sensors(), columns)\n"
     '            sim.step(action)',
     'sim.step(action)\n'
     "            writer.add(frame, columns.pop('action'), sim.sensors(), columns)",
     'test_simulators.py frame_before_them'),

    # pictures of latents
    ('decode.py', 'optimizer.zero_grad()', 'pass',
     'test_decode.py decoder_is_trained'),
    ('decode.py', 'loss.backward()', 'pass',
     'test_decode.py decoder_is_trained'),
    ('decode.py', 'z = z_true[:, :context]',
     'z = z_true[:, 1:context + 1]',
     'test_decode.py rollout_pictures'),
    ('decode.py', 'still = x[:, context - 1:context]', 'still = x[:, context:context + 1]',
     'test_decode.py rollout_pictures'),
    ('decode.py', 'z = (z - norm.bias) / norm.weight', 'z = z / norm.weight',
     'test_decode.py decoder_of_rae'),
    ('decode.py', 'nonzero().flip(1)', 'nonzero()',
     'test_decode.py decoder_of_rae'),
    ('decode.py', 'loss += lpips * perceptual_distance(weights, *windows).mean()', 'pass',
     'test_decode.py learns_from'),
    ('decode.py', 'latents += size * decoder.std', 'latents += 0 * decoder.std',
     'test_decode.py learns_from'),
    ('decode.py', 'raw(*frames[1:], end)', 'raw(*frames[1:], frames[1])',
     'test_decode.py test_films'),
    ('decode.py', 'other = a.roll(B // 2, 0)', 'other = a',
     'test_decode.py test_films'),
    ('plan.py', 'planner.model.stats), planner.encoder, decoder)', 'planner.model.stats), planner.encoder)',
     'test_plan.py shown_through'),

    # arrays of the caller, files and rates of before
    ('train.py', 'if again and not resume and', 'if again and', 'test_train.py restarts_go'),
    ('train.py', 'least = min(min_lr, rate)', 'least = min_lr', 'test_train.py rate_warms'),
    ('train.py', "if os.path.isfile(f'{out_dir}/{name}'):", 'if True:', 'test_train.py folders_in_that'),
    ('train.py', 'basis.float().contiguous().to(device)\n        share', 'basis.float().to(device)\n        share', 'test_train.py resume_is_bitwise'),
    ('train.py', "config['align_names'] != ','.join(probe_names)", 'False', 'test_train.py mistakes_with_projections'),
    ('train.py', "old.get('relabel') and not relabel and more == -1", 'False', 'test_train.py clips_without_actions'),
    ('train.py', 'z_mask[:, P + forced:] * clip_weight', 'z_mask[:, P + forced:]', 'test_train.py guessed_clips'),
    ('train.py', 'if relabel and 2 * step >= awake:', 'if relabel and 2 * step >= max_steps:', 'test_train.py guessed_clips'),
    ('train.py', 'min(grow * max_steps, awake)', 'grow * max_steps', 'test_train.py clips_grow'),
    ('train.py', 'api.auth_check(push, write=True)', 'None', 'test_train.py mistakes_with_the_hub'),
    ('data.py', '(i * share + Fraction(1, 2)) % 1 < share', 'p % max(2, len(indices) // 10) == 1', 'test_data.py grows_holds_out'),
    ('plan.py', 'return self.done[-1].copy()', 'return self.done[-1]', 'test_plan.py keeps_nothing'),
    ('plan.py', 'actions = np.array(actions, float)', 'actions = np.asarray(actions, float)', 'test_plan.py keeps_nothing'),
    ('plan.py', 'goal = np.array(goal)', 'goal = np.asarray(goal)', 'test_plan.py keeps_nothing'),
    ('plan.py', 'rests.append(sim.rest())', 'rests = [s.rest() for s in sims]', 'test_plan.py rests_where'),
    ('plan.py', 'change = (way[:, :, :1] - last)', 'change = (way[:, :, :1] - 0 * last)', 'test_plan.py from_row_to_row'),
    ('plan.py', "self.told('action_keys') or ", '', 'test_plan.py another_robots'),

    # sub-goals
    ('train.py', 'basis[:action_pca].T * (len(chunks) ** 0.5 / sizes[0])', 'basis[:, :action_pca]', 'test_train.py are_their_leading'),
    ('train.py', "name.startswith(('s_', 'a_'))", "name.startswith('s_')", 'test_train.py are_their_leading'),
    ('train.py', '[known[:, 1], :N].square()', '[:, :N].square()', 'test_train.py are_their_leading'),
    ('plan.py', 'ways, costs = best(proposals, cost(proposals, 0), 1)', 'ways, costs = best(proposals, -cost(proposals, 0), 1)', 'test_plan.py best_way_of_the_datas'),
    ('plan.py', "return info['imagine'](way[:, None])[:, 0, 0]", "return info['imagine'](way[:, None])[:, 0, -1]", 'test_plan.py best_way_of_the_datas'),
    ('plan.py', '(to_goal < step) | self.due.isinf()', '(to_goal < step)', 'test_plan.py goal_itself_is_pursued'),
    ('plan.py', '((self.due < 1) | (to_sub_goal < step / self.stride))', '(self.due < 1)', 'test_plan.py goal_itself_is_pursued'),
    ('plan.py', 'self.left[anew | near & self.due.isfinite()]', 'self.left[anew]', 'test_plan.py goal_itself_is_pursued'),
    ('plan.py', 'self.due -= self.o.replan', 'self.due -= 1', 'test_plan.py goal_itself_is_pursued'),
    ('plan.py', 'self.z_goal.clone()', 'self.z_goal', 'test_plan.py what_sub_goals_want'),

    # the policy
    ('model.py', 'kind == 1, last[:, None] - t, 1)', 'kind == 1, last[:, None], 1)', 'test_model.py errors_of_a_policy'),
    ('model.py', 'torch.where(kind % 2 == 0, z_goal[:, None], goal)', 'goal', 'test_model.py errors_of_a_policy'),
    ('model.py', 'masked_fill(known < 2, torch.nan)', 'masked_fill(known < 1, torch.nan)', 'test_model.py errors_of_a_policy'),
    ('model.py', 'with torch.random.fork_rng(devices=[]):', 'if True:', 'test_train.py policy_beside_it'),
    ('train.py', '(share < relabel)', '(share < 1)', 'test_train.py get_the_policys'),
    ('train.py', 'guess[:, :, -1] = 1', 'guess[:, :, -1] = 0', 'test_train.py get_the_policys'),
    ('train.py', 'torch.where(guessed, relabel_weight, 1.0)', 'torch.where(guessed, 1.0, relabel_weight)',
     'test_train.py get_the_policys'),
    ('model.py', '{name: mask * clip_weight for name, mask in counted.items()}', 'counted',
     'test_model.py count_by_their_weight'),
    ('model.py', 'act(before, now, goal[:, 0], (left - h).clamp(min=1))', 'act(before, now, goal[:, 0], left)',
     'test_model.py errors_of_a_dream'),
    ('model.py', 'device=z.device) >= left[:, None]', 'device=z.device) > 0',
     'test_model.py errors_of_a_dream'),
    ('model.py', 'context + row % min(T - context, steps)', 'context + row % (T - context)',
     'test_model.py errors_of_a_dream'),
    ('train.py', '            p.requires_grad_(False)\n        learning = apart[1]', '            pass\n        learning = apart[1]',
     'test_train.py learns_in_the_dream'),
    ('train.py', 'averages = [e for e, p in zip(ema_shards, params) if p in acting]', 'averages = ema_shards[-len(learning):]',
     'test_train.py learns_in_the_dream'),
    ('train.py', 'weight = support if dreaming else 1.0', 'weight = 1.0',
     'test_train.py learns_in_the_dream'),
    ('train.py', '            dist.all_reduce(p.grad)\n            p.grad /= world', '            pass',
     'test_train.py learns_in_the_dream'),
    ('plan.py', '.any(axis=1) & (self.o.hold > 0)', '.any(axis=1)', 'test_plan.py of_which_nothing_is_read'),
    ('plan.py', 'gap < self.o.hold_latents *', 'gap > self.o.hold_latents *', 'test_plan.py of_which_nothing_is_read'),
    ('train.py', 'known[i:i + few, 1:]', 'a_mask[:, 1:]', 'test_train.py get_the_policys'),
    ('data.py', 'start + left * self.frameskip, camera, 1)', 'start + left, camera, 1)', 'test_data.py goals_of_a_batch'),
    ('plan.py', 'self.left = (self.left - moves).clamp(min=1)', 'self.left = (self.left - 1).clamp(min=1)', 'test_plan.py without_a_search'),
    ('plan.py', "hash((seed, 2)) % 2 ** 32)    # not", "seed)    # not", 'test_plan.py proposals_of'),
    ('plan.py', 'a = model.act(before, now, goal, left) + noise', 'a = model.act(now, now, goal, left) + noise', 'test_plan.py proposals_of'),
    ('plan.py', 'rows + self.frameskip // 2) // self.frameskip', 'rows) // self.frameskip', 'test_plan.py controller_acts'),
    ('plan.py', 'there = np.where(sensed, there,', 'there = np.where(True, there,', 'test_plan.py without_sensors'),
]


def copy_project(folder):
    names = subprocess.check_output(['git', 'ls-files'], cwd=ROOT, text=True)
    for name in names.splitlines():
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), os.path.join(folder, name))


def mutate(folder, file, old, new):
    path = os.path.join(folder, file)
    with open(path) as f:
        text = f.read().replace(old, new)
    compile(text, path, 'exec')         # a mutation is a fault of meaning, not of syntax
    with open(path, 'w') as f:
        f.write(text)


def start_tests(folder, file, names):
    """The process that runs the tests of a file whose names have one of these parts; it leaves
    output.txt."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(limit * len(names))     # ends it
    os.chdir(folder)
    output = os.open('output.txt', os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    del sys.modules['data']     # the folder has one of its own
    torch.set_num_threads(1)
    code = pytest.main([f'tests/{file}', '-k', ' or '.join(names), '-x', '-q', '-rA', '--tb=line',
                        '--show-capture=no', '-p', 'no:cacheprovider'])
    sys.stdout.flush()
    os._exit(code)


def ended(folder):
    """Of a run of tests: whether it passed, and the names of those that did or did not."""
    with open(os.path.join(folder, 'output.txt'), errors='replace') as f:
        text = f.read()
    names = {kind: re.findall(rf'^{kind} tests/(.*?)(?: - .*)?$', text, re.M)
             for kind in ('PASSED', 'FAILED', 'ERROR')}
    return names['PASSED'], names['FAILED'] + names['ERROR']


def in_parallel(tasks):
    """Runs tests, `jobs` at once; yields (task, names that passed, that did not, seconds). A task
    is a tuple: file of tests, parts of names, and where there is one the mutation."""
    running = {}        # {process: (task, folder, when it began)}
    tasks = iter(tasks)
    while True:
        for task in itertools.islice(tasks, jobs - len(running)):
            folder = tempfile.mkdtemp()
            copy_project(folder)
            file, names, *mutation = task
            if mutation:
                mutate(folder, *mutation)
            running[start_tests(folder, file, names)] = task, folder, time.monotonic()
        if not running:
            return
        pid, code = os.wait()
        task, folder, begun = running.pop(pid)
        passed, failed = ended(folder)
        if code and not failed:
            failed = [f'the end of the process ({code})']
        shutil.rmtree(folder)
        yield task, passed, failed, time.monotonic() - begun


def one_line(file, old, new):
    return f'{file}: {" ".join(old.split())} -> {" ".join(new.split()) or "nothing"}'


texts = {}
for name in ('model.py', 'data.py', 'train.py', 'plan.py', 'decode.py'):
    with open(os.path.join(ROOT, name)) as f:
        texts[name] = f.read()
unfit = [one_line(*m[:3]) for m in MUTATIONS if texts[m[0]].count(m[1]) != 1]
if unfit:
    sys.exit('\n'.join(['not exactly once in its file:', *unfit]))
chosen = [m for m in MUTATIONS if only in ' '.join(m)]
if not chosen:
    sys.exit(f'--only={only}: no such mutation')

begun = time.monotonic()
names = {}      # {file of tests: parts of their names}
for *_, selection in chosen:
    file, part = selection.split()
    names.setdefault(file, []).append(part)
for (file, parts), passed, failed, seconds in in_parallel(names.items()):
    for part in parts:
        if not any(part in name for name in passed):
            failed.append(f'none of {part}')
    if failed:
        sys.exit(f'without a mutation, tests/{file} wants to pass: {", ".join(failed)}')
    print(f'{file}: {len(passed)} tests pass without a mutation, {seconds:.0f} s', flush=True)

survivors = []
tasks = []
for file, old, new, selection in chosen:
    of, part = selection.split()
    tasks.append((of, [part], file, old, new))
for (of, (part,), *mutation), passed, failed, seconds in in_parallel(tasks):
    if failed:
        print(f'found, {seconds:.0f} s, by {failed[0]}: {one_line(*mutation)}', flush=True)
    else:
        survivors.append(f'{one_line(*mutation)}   (tests/{of} -k {part})')
        print(f'SURVIVED, {seconds:.0f} s: {survivors[-1]}', flush=True)
print(f'{len(survivors)} of {len(chosen)} survive, {(time.monotonic() - begun) / 60:.1f} min')
for line in survivors:
    print(f'  {line}')
sys.exit(bool(survivors))
