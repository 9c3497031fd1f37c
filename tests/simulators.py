"""
Push-T and MuJoCo robots as simulators by plan.py's interface: benchmarks, and examples of your own.

    pip install gym-pusht gymnasium-robotics==1.4.2 'mujoco<3.4'
    python plan.py --record=tests/simulators.py:PushT --policy=script --episodes=1000 --out=pusht
    python plan.py --env=tests/simulators.py:PushT --ckpt=pusht/ckpt.safetensors --episodes=50
"""
import atexit
import os
import sys

import numpy as np

from data import ENVIRONMENT
from plan import Gym, scaled


def cross(a, b):
    """Of vectors (.., 2) in the plane (..,)."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


class PushT(Gym):
    """A disc, the agent, pushes a T on a plane of 512 x 512 (gym_pusht/PushT-v0).

    The action is where the agent is to go: 'action' the target, 'action.relative' (target - agent);
    key says which one step() takes, datasets have both. Only bodies are drawn: the package's
    pictures also show a target that is not ours, the last action and the points of contact.
    pose: agent x, y, block x, y, angle. Reached, as in DINO-WM (arXiv:2411.04983,
    env/pusht/pusht_wrapper.py): the four positions together within 20, the angle within pi / 9.
    """
    unit = 'px of 512'
    names = {'observation.state': ['agent_x', 'agent_y'], ENVIRONMENT: [
        'agent_x', 'agent_y', 'agent_vel_x', 'agent_vel_y', 'agent_turn_rad', 'agent_vel_turn',
        'block_x', 'block_y', 'block_vel_x', 'block_vel_y', 'block_turn_rad', 'block_vel_turn']}

    def __init__(self, size=(0, 0), shift='', key='action'):
        super().__init__('gym_pusht/PushT-v0', size, dict(disable_env_checker=True))
        self.world = self.world.unwrapped
        self.shift = shift
        self.key = key
        self.reset(0)

    def reset(self, seed):
        super().reset(seed)
        if self.shift == 'object':
            for shape in self.world.block.shapes:
                shape.color = (205, 92, 60, 255)

    def target(self, action):
        if self.key == 'action.relative':
            action = action + np.array(self.world.agent.position)
        return np.clip(action, 0, 512)

    def step(self, action):
        super().step(self.target(action))
        self.over = False

    def columns(self, action):
        target = self.target(action)
        return {'action': target, 'action.relative': target - np.array(self.world.agent.position)}

    def frame(self):
        import pygame
        from gym_pusht.envs.pymunk_override import DrawOptions
        screen = pygame.Surface((512, 512))
        screen.fill((250, 235, 190) if self.shift == 'background' else (255, 255, 255))
        options = DrawOptions(screen)
        options.flags = options.DRAW_SHAPES
        self.world.space.debug_draw(options)
        x = np.frombuffer(pygame.image.tobytes(screen, 'RGB'), np.uint8).reshape(512, 512, 3)
        if self.shift == 'light':       # from the right
            x = np.uint8(x * np.linspace(.55, 1, 512)[:, None])
        if self.shift == 'camera':      # 20 px to the left, 12 up
            x = np.pad(x, ((0, 12), (0, 20), (0, 0)), 'edge')[12:, 20:]
        return scaled(x, self.size)

    def state(self):
        parts = []
        for b in (self.world.agent, self.world.block):
            parts += [*b.position, *b.velocity, b.angle, b.angular_velocity]
        return np.array(parts)

    def restore(self, state):
        bodies = self.world.agent, self.world.block
        for b, (x, y, vx, vy, angle, turn) in zip(bodies, state.reshape(2, 6)):
            b.angle = angle     # first: it turns about the centre of mass, which moves the position
            b.position = x, y
            b.velocity = vx, vy
            b.angular_velocity = turn
            self.world.space.reindex_shapes_for_body(b)

    def sensors(self):
        return np.array(self.world.agent.position)

    def pose(self):
        block = self.world.block
        return np.array([*self.world.agent.position, *block.position, block.angle])

    def rest(self):
        if self.key == 'action.relative':
            return np.zeros(2)
        return np.array(self.world.agent.position)

    def far(self, pose, goal, begin):
        turned = abs((pose[4] - goal[4] + np.pi) % (2 * np.pi) - np.pi)
        gap = np.linalg.norm(pose[:4] - goal[:4])
        return gap, gap < 20 and turned < np.pi / 9

    def script(self, rng):
        """Noisy play: half of the time get behind the block and push it towards a random place,
        else go to one or, one time in six, rest: a model that never saw rest cannot stay at a
        goal."""
        aims = []               # where the agent goes, one after the other; None: nowhere
        frames_left = 0         # for the present one
        drift = np.zeros(2)

        def act():
            nonlocal frames_left, drift
            agent = np.array(self.world.agent.position)
            block = np.array(self.world.block.local_to_world(self.world.block.center_of_gravity))
            frames_left -= 1
            drift = .8 * drift + .6 * rng.normal(0, 6, 2)
            there = aims and aims[0] is not None and np.linalg.norm(aims[0] - agent) < 15
            if aims and (frames_left <= 0 or there):
                aims.pop(0)
                frames_left = rng.integers(8, 25)
            if not aims:
                place = rng.uniform(60, 452, 2)
                frames_left = rng.integers(8, 25)
                kind = rng.random()
                push = (place - block) / np.linalg.norm(place - block)
                if kind < .5:
                    behind = block - rng.uniform(60, 110) * push + rng.normal(0, 20, 2)
                    aims.append(behind.clip(20, 492))
                    aims.append(block + (place - block) * rng.uniform(0, 1))
                else:
                    aims.append(place if kind < .83 else None)
            move = np.zeros(2)
            if aims[0] is not None:
                way = aims[0] - agent
                move = way * min(1, 30 / max(np.linalg.norm(way), 1)) + drift
            if self.key == 'action.relative':
                return move
            return np.clip(agent + move, 0, 512)
        return act

    def outline(self):
        """Points (n, 2) on the T's sides, 12 apart, the normals (n, 2) that point into it, and its
        centre of gravity (2,), in the picture."""
        block = self.world.block
        corners = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30),
                            (-60, 30)])
        points = []
        normals = []
        for begin, end in zip(corners, np.roll(corners, -1, axis=0)):
            length = np.linalg.norm(end - begin)
            along = (end - begin) / length
            for way in np.arange(6, length, 12):
                points.append(block.local_to_world(tuple(begin + way * along)))
                normals.append(block.local_to_world((-along[1], along[0])) - block.position)
        centre = np.array(block.local_to_world(block.center_of_gravity))
        return np.array(points), np.array(normals), centre

    def best_push(self, place, turn, rng):
        """Which point of the outline to push, and how far, to bring the T's centre to a place (2,)
        and turn it by so much, as well as one push can. On a side without friction a push moves and
        turns it by its normal and its lever arm."""
        points, normals, centre = self.outline()
        block = self.world.block
        arm = np.sqrt(block.moment / block.mass)        # how long a way counts as much as a turn
        wanted = np.append(place - centre, arm * turn)
        moves = np.column_stack((normals, cross(points - centre, normals) / arm))       # (n, 3)
        length = np.linalg.norm(moves, axis=1)
        gain = moves @ wanted / length
        gain += rng.normal(0, .05 * np.abs(gain).max(), len(gain))
        behind = points - 45 * normals
        gain[((behind < 20) | (behind > 492)).any(axis=1)] -= 1000          # there is a wall
        i = int(np.argmax(gain))
        return i, np.clip(gain[i] / length[i], 5, 70)

    def round(self, behind, centre):
        """Where the agent goes next on its way to a point behind the T: round it, at a distance."""
        agent = np.array(self.world.agent.position)
        here, there = (np.arctan2(*(p - centre)[::-1]) for p in (agent, behind))
        swing = (there - here + np.pi) % (2 * np.pi) - np.pi
        if abs(swing) < .5:
            return behind
        angle = here + np.clip(swing, -.4, .4)
        away = max(115, np.linalg.norm(behind - centre))
        return (centre + away * np.array([np.cos(angle), np.sin(angle)])).clip(20, 492)

    def solve(self, rng, place=None, angle=0):
        """Pushes that succeed: brings the T's centre to a place, and it to an angle, push by push,
        each where the lever arm turns it as it should, then to another. One episode is noisier than
        the next."""
        noise = rng.choice([0, 2, 6])       # px
        point = None            # of the outline, which is pushed
        end = None              # where it is pushed to
        frames_left = 0         # for the present push
        drift = np.zeros(2)

        def act():
            nonlocal place, angle, point, end, frames_left, drift
            agent = np.array(self.world.agent.position)
            points, normals, centre = self.outline()
            turn = (angle - self.world.block.angle + np.pi) % (2 * np.pi) - np.pi
            if place is None or abs(turn) < .1 and np.linalg.norm(place - centre) < 10:
                place = (centre + rng.normal(0, 60, 2)).clip(110, 402)
                turn = rng.uniform(-1, 1)
                angle = self.world.block.angle + turn
                point = None
            frames_left -= 1
            if point is None or frames_left <= 0 or normals[point] @ (end - points[point]) < 3:
                point, far = self.best_push(place, turn, rng)
                end = points[point] + far * normals[point]
                frames_left = 25
            gap = points[point] - agent
            if normals[point] @ gap > 5 and abs(cross(normals[point], gap)) < 12:     # behind it
                aim = agent + 40 * normals[point]
            else:
                aim = self.round(points[point] - 45 * normals[point], centre)
            drift = .8 * drift + .6 * rng.normal(0, 1, 2) * noise
            way = aim - agent
            move = way * min(1, 30 / max(np.linalg.norm(way), 1)) + drift
            if self.key == 'action.relative':
                return move
            return np.clip(agent + move, 0, 512)
        return act


class Mujoco(Gym):
    """A robot of gymnasium-robotics. Without a screen MUJOCO_GL is egl (or osmesa).

    A class of its own says: env, the package's name; inner(), what of it has model, data and a
    renderer; look, the camera's distance, elevation, azimuth and what it looks at; target, the site
    that is not drawn: a goal that is not ours; floor() and thing(), which shifts of the background
    and the object colour; near, within which a goal is reached, as the environments have it.
    """
    exact = True

    def __init__(self, size=(0, 0), shift='', key='action'):
        if not os.environ.get('DISPLAY'):
            os.environ.setdefault('MUJOCO_GL', 'egl')
        height, width = (n or 224 for n in size)
        options = dict(width=width, height=height, disable_env_checker=True)
        try:
            super().__init__(f'gymnasium_robotics:{self.env}', (height, width), options)
        except (AttributeError, ImportError, RuntimeError) as error:    # where there is no OpenGL
            sys.exit(f'{self.env}: cannot draw with MUJOCO_GL={os.environ.get("MUJOCO_GL", "")} '
                     f'({error}): egl wants libegl1 and a driver, osmesa wants libosmesa6 (apt-get '
                     'install)')
        import mujoco
        self.mujoco = mujoco
        self.name = self.env
        self.world = self.world.unwrapped
        atexit.register(self.world.close)       # later, OpenGL would be gone already
        inner = self.inner()
        self.model = inner.model
        self.data = inner.data
        self.viewer = inner.mujoco_renderer.viewer
        self.fps = round(1 / inner.dt)
        self.names = {ENVIRONMENT: self.numbers()}
        camera = self.viewer.cam
        camera.distance, camera.elevation, camera.azimuth, camera.lookat[:] = self.look()
        self.model.site(self.target).rgba[3] = 0
        if shift == 'light':
            self.model.vis.headlight.diffuse[:] *= .5
            self.model.light_diffuse[:] *= .4
        if shift == 'camera':
            camera.azimuth += 5
            camera.lookat[:2] += .02 * camera.distance
        if shift == 'background':
            self.paint(self.floor(), (.9, .8, .5, 1))
        if shift == 'object':
            self.paint(self.thing(), (.9, .3, .1, 1))
        self.reset(0)

    def paint(self, part, colour):
        part.matid[:] = -1
        part.rgba[:] = colour

    def frame(self):
        self.viewer.make_context_current()      # else the simulator that was made last is drawn
        # a step leaves the bodies where they were before it
        self.mujoco.mj_kinematics(self.model, self.data)
        return super().frame()

    def state(self):
        kind = self.mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(self.mujoco.mj_stateSize(self.model, kind))
        self.mujoco.mj_getState(self.model, self.data, state, kind)
        return state

    def numbers(self):
        """Names of state(): where joints are, then how they move and what moves them."""
        names = ['time']
        for i in range(self.model.njnt):
            joint = self.model.joint(i)
            places = [''] if len(joint.qpos0) == 1 else '_x _y _z _qw _qx _qy _qz'.split()
            names += [joint.name + place for place in places[-len(joint.qpos0):]]
        names += [f'vel_{i}' for i in range(self.model.nv)]
        return names + [f'force_{i}' for i in range(len(self.state()) - len(names))]

    def sensors(self):
        return self.pose()[:3]      # of the ball or the hand, nothing of a cube

    def restore(self, state):
        kind = self.mujoco.mjtState.mjSTATE_INTEGRATION
        self.mujoco.mj_setState(self.model, self.data, state, kind)
        self.mujoco.mj_forward(self.model, self.data)

    def step(self, action):
        super().step(np.clip(action, -1, 1).astype(np.float32))
        self.over = False

    def far(self, pose, goal, begin):
        gap = np.linalg.norm((pose - goal)[-3:])
        return gap, gap < self.near


class PointMaze(Mujoco):
    """A force (x, y) moves a ball through a maze, seen from above. pose: x, y in cells."""
    env = 'PointMaze_UMaze-v3'
    target = 'target'
    near = .45
    unit = 'cells'

    def inner(self):
        return self.world.point_env

    def look(self):
        maze = self.world.maze
        return 1.2 * max(maze.map_length, maze.map_width) - 2, -90, 90, 0

    def floor(self):
        return self.model.geom('ground')

    def thing(self):
        return self.model.site('particle_site')

    def pose(self):
        return self.data.qpos.copy()

    def route(self, start, end):
        """The cells from start to end, breadth first over the free ones."""
        came_from = {end: end}
        cells = [end]
        for row, column in cells:
            for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                near = row + i, column + j
                if self.world.maze.maze_map[near[0]][near[1]] != 1 and near not in came_from:
                    came_from[near] = row, column
                    cells.append(near)
        way = []
        while start != end:
            start = came_from[start]
            way.append(start)
        return way

    def script(self, rng):
        """Noisy behaviour: through the maze to random places."""
        maze = self.world.maze
        frames_left = 0         # for the present way
        way = []                # places still to go through
        aim = None              # the present one
        drift = np.zeros(2)

        def act():
            nonlocal frames_left, way, aim, drift
            pose = self.pose()
            frames_left -= 1
            drift = .9 * drift + .44 * rng.normal(0, .4, 2)
            if frames_left <= 0:
                free = np.argwhere(np.asarray(maze.maze_map, object) != 1)
                here = tuple(int(v) for v in maze.cell_xy_to_rowcol(pose))
                cells = self.route(here, tuple(int(v) for v in rng.choice(free)))
                frames_left = rng.integers(50, 200)
                way = []
                for cell in cells:
                    place = maze.cell_rowcol_to_xy(np.array(cell))
                    way.append(place + rng.uniform(-.25, .25, 2))
                aim = pose
            if way and np.linalg.norm(pose - aim) < .3:
                aim = way.pop(0)
            return np.clip(2 * (aim - pose) - .4 * self.data.qvel + drift, -1, 1)
        return act


class FetchReach(Mujoco):
    """The motion (x, y, z) of a 7-DoF arm's hand in units of 5 cm, and of its fingers, which stay
    shut. pose: the hand's x, y, z."""
    env = 'FetchReach-v4'
    target = 'target0'
    near = .05
    unit = 'm'

    def inner(self):
        return self.world

    def look(self):
        # nor are the axes drawn that show where the hand should be
        mocap = self.model.body('robot0:mocap').id
        self.model.geom_rgba[self.model.geom_bodyid == mocap, 3] = 0
        return 1., -50, 180, (1.3, .75, .42)

    def floor(self):
        return self.model.geom('floor0')

    def thing(self):
        return self.model.geom('robot0:gripper_link')

    def pose(self):
        return self.data.site('robot0:grip').xpos.copy()

    def place(self, rng, pose):
        """Where the script goes next."""
        return np.array([1.34, .75, .53]) + rng.uniform((-.15, -.15, -.1), (.15, .15, .15))

    def script(self, rng):
        """Noisy behaviour: the hand goes to random places."""
        frames_left = 0
        aim = None
        drift = np.zeros(4)

        def act():
            nonlocal frames_left, aim, drift
            pose = self.pose()
            frames_left -= 1
            drift = .9 * drift + .44 * rng.normal(0, .4, 4)
            if frames_left <= 0:
                frames_left = rng.integers(4, 12)
                aim = self.place(rng, pose)
            return np.append(np.clip(8 * (aim - pose[:3]) + drift[:3], -1, 1), 0)
        return act

    def elsewhere(self, i, rng):
        self.reset(int(rng.integers(2 ** 31)))      # which puts the hand where it always is
        act = self.script(rng)
        for _ in range(40):
            self.step(act())
        for _ in range(10):
            self.step(self.rest())


class FetchPush(FetchReach):
    """The same arm and a cube on a table. pose: x, y, z of the hand and of the cube."""
    env = 'FetchPush-v4'

    def thing(self):
        return self.model.geom('object0')

    def pose(self):
        return np.hstack([self.data.site('robot0:grip').xpos, self.data.site('object0').xpos])

    def solve(self, rng, place=None):
        """Pushes that succeed: brings the cube to a place (2,) on the table, from behind it, then to
        another. One episode is noisier than the next."""
        noise = rng.choice([0, .2, .4])
        drift = np.zeros(4)

        def act():
            nonlocal place, drift
            pose = self.pose()
            hand, cube = pose[:3], pose[3:]
            if place is None or np.linalg.norm(place - cube[:2]) < .015:
                place = np.clip(cube[:2] + rng.normal(0, .1, 2), (1.15, .55), (1.45, .95))
            way = place - cube[:2]
            push = way / np.linalg.norm(way)
            off = cube[:2] - hand[:2]
            lined_up = push @ off > .02 and abs(cross(push, off)) < .02
            aim = np.append(cube[:2] - .07 * push, cube[2])
            if lined_up and hand[2] < cube[2] + .03:
                aim[:2] = place - .03 * push
            elif np.linalg.norm(aim[:2] - hand[:2]) > .03:      # over it
                aim[2] = cube[2] + .09
                if hand[2] < cube[2] + .06:
                    aim[:2] = hand[:2]
            drift = .9 * drift + .44 * rng.normal(0, 1, 4) * noise
            return np.append(np.clip(8 * (aim - hand) + drift[:3], -1, 1), 0)
        return act

    def place(self, rng, pose):     # two in three times low and through the cube
        place = super().place(rng, pose)
        if rng.random() < .67:
            hand = pose[:3]
            cube = pose[3:]
            place = cube + (cube - hand) * rng.uniform(.2, 1) + rng.normal(0, .03, 3)
            place = np.clip(place, (1.1, .45, 0), (1.5, 1.05, 1))
            place[2] = cube[2]
        return place

    def elsewhere(self, i, rng):
        Gym.elsewhere(self, i, rng)

    def asks(self, i, begin, goal):     # a cube that has fallen off the table does not come back
        return super().asks(i, begin, goal) and min(begin[5], goal[5]) >= .4
