"""
Plan towards a goal image by searching actions inside a trained world model.

    python plan.py                                                # closed loop in the demo world, beside baselines
    python plan.py --ckpt=out/ckpt.safetensors --start=now.png --goal=goal.png       # one plan, for two pictures

Leaves plan.json and plan.mp4 (closed loop), or plan.npy and plan.mp4 (pictures), in the folder of the checkpoint.
"""
import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import half_weights, load, pictures, restore_encoder, rollout

# --------------------------------------------------------------------------------------------------------------------
ckpt = 'out/ckpt.safetensors'
out_dir = ''                # '' = the folder of the checkpoint
encoder_path = ''           # the encoder's weights; '' = where training found them
# plan between two pictures
start = ''                  # a picture of now; '' = closed loop in the demo world
goal = ''                   # a picture of what is wanted
robot = 0                   # whose actions: the number of the labelled dataset, counted from 0
# search
horizon = 5                 # model steps
samples = 64                # candidates per iteration
elites = 8                  # the best of them, which the next iteration is drawn from
iterations = 5
init_std = 1.0              # of the first candidates of a search, in units of the actions' std
persist = 0.5               # share of a candidate's noise that all its steps have in common: far goals want long moves
min_std = 0.05              # in units of the actions' std, so that the search does not collapse
K = 1                       # denoising steps per imagined frame
cost = 'all'                # distance to the goal: all = summed over the steps, last = at the last one
smooth = 0.0                # weight of squared changes of the action, in normalised units
chunk = 0                   # candidates imagined at once, over all episodes: 0 = 128 on a CPU (its caches), else 4096
# closed loop
episodes = 20               # half of them reaching, half pushing
goals = 'expert'            # expert: a state goal_steps later on a scripted trajectory; random: any state at rest
goal_steps = 10
budget = 20                 # environment steps, fixed in advance
replan = 1                  # model steps that are executed before planning again
seed = 0
device = 'auto'
dtype = 'auto'              # float32 or bfloat16; auto = bfloat16 where the hardware multiplies it
config = data.override(globals(), sys.argv[1:] if __name__ == '__main__' else [])
# --------------------------------------------------------------------------------------------------------------------


def cem(cost, mean, std, low, high, samples=64, elites=8, iterations=5, min_std=0.05, persist=0.0, generator=None):
    """Cross-entropy method, for E episodes at once -> actions (E, H, A), costs of the best (iterations, E).

    cost(actions (E, M, H, A), iteration) -> (E, M), lower is better. mean and std (E, H, A) are where to begin; low and
    high (A,) bound every candidate. Each iteration draws M samples (the first is the mean itself) and moves mean and
    std to those of the elites (DINO-WM's rule, arXiv:2411.04983, with bounds and a least std). A share `persist` of the
    noise's variance is the same at all steps of a candidate: independent noise cancels out over the steps and does not
    get far (cf. iCEM's coloured noise, arXiv:2008.06389). Returns the last mean.
    """
    costs = []
    for i in range(iterations):
        E, H, A = mean.shape
        noise = ((1 - persist) ** 0.5 * torch.randn(E, samples, H, A, generator=generator)
                 + persist ** 0.5 * torch.randn(E, samples, 1, A, generator=generator)).to(mean)
        actions = mean[:, None] + std[:, None] * noise                                    # (E, M, H, A)
        actions[:, 0] = mean
        actions = actions.clamp(low, high)
        found, best = cost(actions, i).topk(elites, dim=1, largest=False)                 # (E, elites)
        elite = actions.gather(1, best[:, :, None, None].expand(-1, -1, *mean.shape[1:]))
        mean, std = elite.mean(dim=1), elite.std(dim=1).clamp(min=min_std)
        costs.append(found[:, 0])
    return mean.clamp(low, high), torch.stack(costs)


def plan(model, z_ctx, a_ctx, z_goal, horizon=5, low=-5.0, high=5.0, mean=None, K=1, cost='all', smooth=0.0,
         samples=64, elites=8, iterations=5, init_std=1.0, min_std=0.05, persist=0.5, chunk=0, seed=0):
    """Normalised actions (E, horizon, A) that lead the model from its context to the goal, and info.

    z_ctx (E, Tc, N, D), a_ctx (E, Tc, A) with a_ctx[:, t] what led to z_ctx[:, t] (the first is not known and not
    used), z_goal (E, N, D): normalised. mean (E, horizon, A): where to begin, e.g. the last plan, shifted. The cost is
    the squared distance to the goal in un-whitened latents: each channel counts by its variance in the data. All
    candidates of an iteration see the same denoising noise. info: 'cost' (iterations, E), 'z' the imagined way.
    """
    E, Tc, A = a_ctx.shape
    weight = model.stats['z_std'] ** 2
    weight = weight / weight.mean()
    chunk = chunk or (128 if z_ctx.device.type == 'cpu' else 4096)
    low, high = (torch.as_tensor(v, dtype=z_ctx.dtype, device=z_ctx.device).expand(A) for v in (low, high))

    def imagine(actions, seed):     # (E, M, H, A) -> (E, M, H, N, D)
        M = actions.shape[1]
        a = torch.cat((a_ctx[:, None].expand(-1, M, -1, -1), actions), dim=2).flatten(0, 1)
        a_mask = torch.ones(a.shape[:2], dtype=torch.bool, device=a.device)
        a_mask[:, 0] = False
        return rollout(model, z_ctx, a, a_mask, K=K, seed=seed).unflatten(0, (E, M))

    def distance(actions, i):
        out = []
        for part in actions.split(max(1, chunk // E), dim=1):
            error = ((imagine(part, seed + i) - z_goal[:, None, None]).square() * weight).mean(dim=(3, 4))
            jerk = torch.cat((part[:, :, :1] - a_ctx[:, None, -1:] * (Tc > 1), part.diff(dim=2)), dim=2)
            out.append((error.mean(dim=2) if cost == 'all' else error[:, :, -1])
                       + smooth * jerk.square().mean(dim=(2, 3)))
        return torch.cat(out, dim=1)

    generator = torch.Generator().manual_seed(seed)
    mean = torch.zeros(E, horizon, A, device=z_ctx.device) if mean is None else mean
    std = torch.full_like(mean, init_std)
    actions, costs = cem(distance, mean, std, low, high, samples, elites, iterations, min_std, persist,
                         generator)
    return actions, {'cost': costs, 'z': imagine(actions[:, None], seed)[:, 0]}


def wilson(k, n, z=1.96):
    """The 95 % interval of a share k / n (Wilson 1927): honest for small n and near 0 and 1."""
    centre, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return [max(0.0, centre - half), min(1.0, centre + half)]


if __name__ == '__main__':
    data.one_of('cost', cost, ('all', 'last'))
    data.one_of('goals', goals, ('expert', 'random'))
    data.one_of('dtype', dtype, ('auto', 'float32', 'bfloat16'))
    for name in ('horizon', 'samples', 'elites', 'iterations', 'episodes', 'goal_steps', 'budget', 'replan'):
        if config[name] < 1:
            sys.exit(f'--{name}: wants at least 1, got {config[name]}')
    if not 2 <= elites <= samples:
        sys.exit(f'--elites={elites}: wants 2 to samples={samples}, a std needs two')
    if goals == 'expert' and goal_steps < 5:
        sys.exit(f'--goal_steps={goal_steps}: nothing gets far enough for a goal, wants at least 5')
    for name, low, high in (('persist', 0, 1), ('init_std', 1e-6, 100), ('min_std', 0, 100), ('seed', 0, 2 ** 31)):
        if not low <= config[name] <= high:
            sys.exit(f'--{name}: wants {low} to {high}, got {config[name]}')
    if replan > horizon:
        sys.exit(f'--replan={replan}: a plan has only horizon={horizon} steps')
    if bool(start) != bool(goal):
        sys.exit('--start and --goal come together: two pictures')
    device = data.pick_device(device)
    autocast = data.autocast(device, dtype)
    model, trained = load(ckpt, device)
    if not model.config['action_dim']:
        sys.exit(f'{ckpt}: was trained without actions, there is nothing to search')
    if K < 1 or K & (K - 1) or K > model.config['k_max']:
        sys.exit(f'--K={K}: wants a power of two up to {model.config["k_max"]}, the k_max that {ckpt} was trained with')
    if autocast._enabled:
        half_weights(model, autocast.fast_dtype)
    encode = restore_encoder(trained, model.stats, encoder_path).to(device)
    frame_size = encode.size, encode.width
    out_dir = out_dir or os.path.dirname(ckpt) or '.'
    stats = {k: v.cpu() for k, v in model.stats.items()}
    if not 0 <= robot < len(stats['a_mean']):
        sys.exit(f'--robot={robot}: {ckpt} knows {len(stats["a_mean"])} labelled datasets, counted from 0')
    a_mean, a_std, a_low, a_high = (stats[f'a_{k}'][robot] for k in ('mean', 'std', 'low', 'high'))
    used = int(stats['a_width'][robot])                         # of the padded width
    frameskip = int(stats['a_rows'][robot])                     # dataset rows in a model step
    scale = torch.where(a_std > 1e-6, a_std, torch.inf)         # constant dimensions stay at their mean
    low, high = (((v - a_mean) / scale).clamp(-5, 5).to(device) for v in (a_low, a_high))
    search = dict(horizon=horizon, low=low, high=high, K=K, cost=cost, smooth=smooth, samples=samples, elites=elites,
                  iterations=iterations, init_std=init_std, min_std=min_std, persist=persist,
                  chunk=chunk)

    @torch.no_grad()
    def latents(x):
        """Normalised latents (n, N, D) of uint8 frames (n, 3, H, W)."""
        with autocast:
            z = encode(data.resize(x, frame_size).to(device).float() / 255).float()
        return (z - model.stats['z_mean']) / model.stats['z_std']

    def physical(a):
        """(.., A) normalised -> (.., frameskip, action width): one row per dataset step."""
        return (a.cpu() * torch.where(a_std > 1e-6, a_std, 0.0) + a_mean)[..., :used].unflatten(-1, (frameskip, -1))

    def normalised(a):
        """The inverse of physical, padded to the model's width."""
        a = F.pad(torch.tensor(a, dtype=torch.float32).flatten(-2), (0, len(a_mean) - used))
        return ((a - a_mean) / scale).clamp(-5, 5).to(device)

    if start:
        x = [data.read_image(path, frame_size) for path in (start, goal)]
        z_now, z_goal = latents(torch.stack(x)).split(1)
        begun = time.perf_counter()
        with autocast:
            nothing = torch.zeros(1, 1, len(a_mean), device=device)
            actions, info = plan(model, z_now[:, None], nothing, z_goal, seed=seed, **search)
        rows = physical(actions[0]).flatten(0, 1).numpy()                                 # (horizon x frameskip, width)
        seconds = time.perf_counter() - begun
        for i, row in enumerate(rows):
            print(f'{i:3d}  ' + ' '.join(f'{v:9.4f}' for v in row))
        weight = (model.stats['z_std'] ** 2 / (model.stats['z_std'] ** 2).mean())
        far = [((z - z_goal).square() * weight).mean().item() for z in (z_now, info['z'][:, -1])]
        print(f'{len(rows)} actions in {seconds:.2f} s; latent distance to the goal {far[0]:.4f} now, {far[1]:.4f} '
              'imagined at the end')
        os.makedirs(out_dir, exist_ok=True)
        np.save(os.path.join(out_dir, 'plan.npy'), rows)
        way = torch.cat((z_now, info['z'][0], z_goal)) * model.stats['z_std'] + model.stats['z_mean']
        shown = pictures(way, encode)
        video = torch.cat((shown[:-1], shown[-1:].expand(len(shown) - 1, -1, -1, -1)), dim=3)     # imagined | goal
        data.write_video(os.path.join(out_dir, 'plan.mp4'), data.enlarge(video), 2)
        print('wrote', os.path.join(out_dir, 'plan.npy'), 'and', os.path.join(out_dir, 'plan.mp4'))
        sys.exit()

    # closed loop in the demo world
    if used != 2 * frameskip or (a_high[:used] - data.DEMO_STEP).abs().max() > 0.1 * data.DEMO_STEP:
        sys.exit(f'{ckpt}: was trained on another robot, not on the demo world: give --start and --goal')
    rng = np.random.default_rng(seed + 1_000_000)               # of no dataset
    context = trained['eval_context']
    past = (context - 1) * frameskip                            # real frames and actions before the start
    kind = np.arange(episodes) % 2                              # 0: reach with the tip, 1: push the disc
    begin, target, history, expert = [], [], [], []
    while len(begin) < episodes:
        s, a = data.demo_episodes(100, past + goal_steps + 1, rng)
        wanted = s[:, -1] if goals == 'expert' else data.demo_start(100, rng)
        tip, disc = (np.linalg.norm(wanted[:, i:i + 2] - s[:, past, i:i + 2], axis=1) for i in (0, 2))
        fits = (tip > 0.2) & (disc < 0.02) if kind[len(begin)] == 0 else disc > 0.15
        if goals == 'random' and kind[len(begin)] == 0:         # reaching: the disc stays where it is
            wanted[:, 2:] = s[:, past, 2:]
            fits = (tip > 0.2) & (np.linalg.norm(wanted[:, :2] - wanted[:, 2:], axis=1) > data.TIP + data.DISC)
        for i in np.flatnonzero(fits)[:1]:
            begin.append(s[i, past])
            target.append(wanted[i])
            history.append((s[i, :past + 1:frameskip], a[i, :past].reshape(context - 1, frameskip, 2)))
            expert.append(a[i, past:past + goal_steps])
    begin, target, expert = np.stack(begin), np.stack(target), np.stack(expert)

    def frames(state, size=64):
        return torch.from_numpy(data.demo_draw(state, size)).permute(0, 3, 1, 2)

    def distance(state):
        """Table widths between tip (reaching) or disc (pushing) and where the goal picture has it."""
        return np.linalg.norm(np.where(kind[:, None] == 0, (state - target)[:, :2], (state - target)[:, 2:]), axis=1)

    def model_policy(z, a, last, k):
        """Plans (E, horizon, A), normalised, for all episodes from the last frames and actions seen."""
        mean = None if last is None else torch.cat((last[:, replan:], torch.zeros_like(last[:, :replan])), dim=1)
        with autocast:
            return plan(model, z, a, z_goal, mean=mean, seed=seed + 1000 * k, **search)[0]

    def run(policy):
        """A fixed budget under a policy: states (budget + 1, E, 4), actions (budget, E, 2), seconds per plan of all."""
        states, actions, seconds, last, plans = [begin], [], 0.0, None, 0
        seen = [frames(np.stack([h[0][t] for h in history])) for t in range(context)]
        z = torch.stack([latents(x) for x in seen], dim=1)                                    # (E, Tc, N, D)
        a = torch.zeros(episodes, context, len(a_mean), device=device)
        for t in range(1, context):
            a[:, t] = normalised(np.stack([h[1][t - 1] for h in history]))
        while len(actions) < budget:
            if policy == 'model':
                begun = time.perf_counter()
                last = model_policy(z, a, last, plans)
                todo = physical(last[:, :replan]).numpy()                                 # (E, replan, frameskip, 2)
                seconds, plans = seconds + time.perf_counter() - begun, plans + 1
            else:
                todo = policy(len(actions), (episodes, replan, frameskip, 2))
            for step in range(replan):
                for act in todo[:, step].swapaxes(0, 1):
                    actions.append(act)
                    states.append(data.demo_step(states[-1], act))
                z = torch.cat((z[:, 1:], latents(frames(states[-1]))[:, None]), dim=1)
                a = torch.cat((a[:, 1:], normalised(todo[:, step])[:, None]), dim=1)
        return np.stack(states)[:budget + 1], np.stack(actions)[:budget], seconds / max(1, plans)

    def replay(t, shape):       # the script's own actions, then rest
        out = np.zeros((episodes, shape[1] * shape[2], 2))
        own = expert[:, t:t + out.shape[1]]
        out[:, :own.shape[1]] = own
        return out.reshape(shape)

    z_goal = latents(frames(target))
    reach = data.DEMO_STEP
    policies = dict(model='model', random=lambda t, shape: rng.uniform(-reach, reach, shape),
                    zero=lambda t, shape: np.zeros(shape),
                    mean=lambda t, shape: np.broadcast_to(physical(torch.zeros(len(a_mean))).numpy(), shape))
    if goals == 'expert':
        policies['expert'] = replay
    print(f'{episodes} episodes, half reaching, half pushing; {goals} goals; budget {budget} environment steps; '
          f'success: within {data.DEMO_NEAR} table widths', flush=True)
    methods, shown = {}, None
    for name, policy in tqdm(policies.items(), disable=not sys.stderr.isatty()):
        states, executed, seconds = run(policy)
        far = np.stack([distance(s) for s in states])                                         # (budget + 1, E)
        ok = far < data.DEMO_NEAR
        end, ever = ok[-1], ok.any(axis=0)
        methods[name] = dict(
            success_end=end.mean().item(), success_ever=ever.mean().item(), ci95=wilson(int(end.sum()), episodes),
            steps=ok.argmax(axis=0)[ever].mean().item() if ever.any() else None, distance_end=far[-1].mean().item(),
            seconds_per_plan=seconds / episodes if name == 'model' else None,
            jerk=np.square(np.diff(executed, 2, axis=0)).sum(axis=2).mean().item() if budget > 2 else None,
            reach=end[kind == 0].mean().item(), push=end[kind == 1].mean().item() if episodes > 1 else None)
        r = methods[name]
        tqdm.write(f'{name:7s} success at the end {r["success_end"]:.2f} (95 % interval {r["ci95"][0]:.2f} to '
                   f'{r["ci95"][1]:.2f}), ever {r["success_ever"]:.2f}, reaching {r["reach"]:.2f}'
                   + (f', pushing {r["push"]:.2f}' if episodes > 1 else '') + f', distance {r["distance_end"]:.3f}'
                   + (f', {seconds / episodes:.2f} s per plan ({episodes} at once: {seconds:.1f} s)'
                      if name == 'model' else ''), file=sys.stdout)
        sys.stdout.flush()
        if name == 'model':
            shown = states, ok
    os.makedirs(out_dir, exist_ok=True)
    with open(os.path.join(out_dir, 'plan.json'), 'w') as f:
        json.dump(dict(env='demo', episodes=episodes, budget_steps=budget, goals=goals, seed=seed, methods=methods), f,
                  indent=1)
    # up to eight episodes, each: now | goal; the line below turns green while the goal is reached
    states, ok = shown
    n, px = min(8, episodes), 96
    video = []
    for state, good in zip(states, ok):
        tiles = torch.cat((frames(state[:n], px), frames(target[:n], px)), dim=3)             # (n, 3, px, 2 px)
        bar = torch.where(torch.from_numpy(good[:n])[:, None, None, None], torch.tensor([40, 170, 70])[:, None, None],
                          torch.tensor([200, 200, 200])[:, None, None]).to(torch.uint8)
        tiles = F.pad(torch.cat((tiles, bar.expand(-1, -1, 6, tiles.shape[3])), dim=2), (3, 3, 3, 3), value=255)
        rows = [torch.cat(list(tiles[i:i + 2]), dim=2) for i in range(0, n - n % 2, 2)] or [tiles[0]]
        video.append(torch.cat(rows, dim=1))
    data.write_video(os.path.join(out_dir, 'plan.mp4'), torch.stack(video + video[-1:] * 5), 5)
    print('wrote', os.path.join(out_dir, 'plan.json'), 'and', os.path.join(out_dir, 'plan.mp4'))
