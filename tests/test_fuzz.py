"""python -m pytest tests/test_fuzz.py: files made to do harm, and three thousand mutated ones (fuzz.py)."""
import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import av
import pytest
import torch

import data
import model
from conftest import ROOT, SMALL, ends

SIDE = 16000


def bomb():
    """A PNG of 3 MB that says, and holds, 256 million pixels of 6 bytes."""
    def chunk(name, content):
        return len(content).to_bytes(4, 'big') + name + content + zlib.crc32(name + content).to_bytes(4, 'big')
    count = SIDE * (1 + 6 * SIDE)       # zeros; deflated in pieces, which repeat
    press = zlib.compressobj(9, wbits=-15)
    piece = press.compress(bytes(count // 1000)) + press.flush(zlib.Z_FULL_FLUSH)
    zeros = b'\x78\xda' + piece * 1000 + b'\x03\0' + (count % 65521 << 16 | 1).to_bytes(4, 'big')
    header = SIDE.to_bytes(4, 'big') * 2 + bytes([16, 2, 0, 0, 0])
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zeros) + chunk(b'IEND', b'')


def bomb_of_video(path):
    with av.open(str(path), 'w', 'mov') as container:
        stream = container.add_stream('png', 10, width=SIDE, height=SIDE, pix_fmt='rgb48be')
        packet = av.Packet(bomb())
        packet.pts = packet.dts = 0
        packet.stream = stream
        container.mux(packet)


def refused(call, *arguments):
    """call(..) ends in one line."""
    with pytest.raises((data.Bad, SystemExit)) as error:
        call(*arguments)
    text = str(error.value)
    assert text and '\n' not in text, text
    return text


READERS = [data.read_image, lambda path: data.read_frames(path, [0]), lambda path: data.import_videos(f'{path}.out', path)]


@pytest.mark.parametrize('read', READERS, ids=['picture', 'video', 'videos'])
def test_a_picture_of_absurd_size_is_refused_before_it_is_decoded(tmp_path, read):
    path = str(tmp_path / 'x.png')
    if read is READERS[0]:
        Path(path).write_bytes(bomb())
    else:
        path = str(tmp_path / 'x.mov')
        bomb_of_video(path)
    peak = Path('/proc/self/status')
    ...
