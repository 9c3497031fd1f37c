"""python -m pytest tests/test_fuzz.py: files made to do harm, and three thousand mutated ones (fuzz.py)."""
import os
import pickle
import subprocess
import sys
import time
import zlib
from pathlib import Path

import av
import pytest
import torch

import data
import model
from conftest import ROOT, SMALL, ends
from test_data import edit_info, write_v2

SIDE = 16000


def chunk(name, content):
    return len(content).to_bytes(4, 'big') + name + content + zlib.crc32(name + content).to_bytes(4, 'big')


def bomb():
    """A PNG of 1.5 MB that says, and holds, 256 million pixels of 6 bytes."""
    count = SIDE * (1 + 6 * SIDE)       # zeros; deflated in pieces, which repeat
    press = zlib.compressobj(9, wbits=-15)
    piece = press.compress(bytes(count // 1000)) + press.flush(zlib.Z_FULL_FLUSH)
    zeros = b'\x78\xda' + piece * 1000 + b'\x03\0' + (count % 65521 << 16 | 1).to_bytes(4, 'big')
    header = SIDE.to_bytes(4, 'big') * 2 + bytes([16, 2, 0, 0, 0])
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zeros) + chunk(b'IEND', b'')


def video_of(path, content):
    """A video of one PNG."""
    with av.open(path, 'w', 'mov') as container:
        stream = container.add_stream('png', 10, width=SIDE, height=SIDE, pix_fmt='rgb48be')
        packet = av.Packet(content)
        packet.pts = packet.dts = 0
        packet.stream = stream
        container.mux(packet)


def refused(call, *arguments):
    """The one line with which call(..) ends, at once."""
    begun = time.process_time(), time.monotonic()
    with pytest.raises((data.Bad, SystemExit)) as error:
        call(*arguments)
    text = str(error.value)
    assert text and '\n' not in text, text
    assert time.process_time() - begun[0] < 3 and time.monotonic() - begun[1] < 15, 'refused, but late'
    return text


READERS = {'picture': data.read_image, 'video': lambda path: data.read_frames(path, [0]),
           'videos': lambda path: data.import_videos(f'{path}.out', path)}


@pytest.mark.parametrize('reader', READERS)
def test_what_says_it_is_of_absurd_size_is_not_decoded(tmp_path, reader):
    path = str(tmp_path / 'x')
    if reader == 'picture':
        Path(path).write_bytes(bomb())
    else:
        video_of(path, bomb())
    refused(READERS[reader], path)


LISTS = {'hls': '#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n',
         'concat': 'ffconcat version 1.0\nfile a.ts\n',
         'sdp': 'v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n'
                'a=rtpmap:96 H264/90000\n'}


@pytest.mark.parametrize('reader', READERS)
@pytest.mark.parametrize('name', LISTS)
@pytest.mark.parametrize('ending', ['png', 'mp4', 'm3u8'])
def test_a_list_of_other_files_is_neither_picture_nor_video(tmp_path, reader, name, ending):
    with av.open(str(tmp_path / 'a.ts'), 'w') as container:     # what it must not show
        stream = container.add_stream('libx264', 25, width=48, height=32)
        container.mux(stream.encode(av.VideoFrame(48, 32, 'yuv420p')) + stream.encode(None))
    path = tmp_path / f'x.{ending}'
    path.write_text(LISTS[name])
    refused(READERS[reader], str(path))


class Harm:
    """What makes a folder when it is unpickled."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('write', [torch.save, pickle.dump])
@pytest.mark.parametrize('name', ['weights.pth', 'weights.safetensors', 'out/optim.pt'])
def test_a_pickle_runs_no_code(trained, demo, tmp_path, write, name):
    path = tmp_path / name
    harm = Harm(tmp_path / 'harm')
    path.parent.mkdir(exist_ok=True)
    with open(path, 'wb') as f:
        write({'model': harm, 'step': harm, 'optimizer': harm}, f)
    if name == 'out/optim.pt':
        (path.parent / 'ckpt.safetensors').write_bytes((trained / 'ckpt.safetensors').read_bytes())
        line = ends('train.py', *demo, *SMALL, '--max_steps=21', '--resume=True', f'--out_dir={path.parent}')
    else:
        line = refused(model.load_encoder, 'dinov2_vits14', str(path))
    assert name in line and not (tmp_path / 'harm').exists()
    with open(path, 'rb') as f:         # it would
        torch.load(f, weights_only=False) if write is torch.save else pickle.load(f)
    assert (tmp_path / 'harm').exists()


@pytest.mark.parametrize('word', [
    '{x.__class__}', '{episode_index.__class__}', '{episode_index.real}', '{episode_index!r}', '{video_key[0]}',
    '{episode_index:999999999d}', '../../d/x', '/etc/passwd', 'a/../../../x', '\0'])
@pytest.mark.parametrize('path', ['data_path', 'video_path'])
def test_a_template_reads_nothing_and_leads_nowhere(tmp_path, path, word):
    refused(data.LeRobot, edit_info(write_v2(tmp_path / 'd', 'v2.1', lengths=(3, 3)), **{path: word}))


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc, and limits of memory that hold')
def test_three_thousand_mutated_files():
    done = subprocess.run([sys.executable, f'{ROOT}/tests/fuzz.py', '--n=3000'], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
