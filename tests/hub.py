"""
A stand-in for the Hugging Face hub: repositories in a folder, served on loopback, with faults on order.

    with Hub(folder) as hub:                        # folder/owner/name/meta/info.json, ..
        hub.fail('.mp4', 'cut', times=2)        # the next two downloads of a video break off
        hub.fail('info.json', 429, seconds=1)   # Retry-After: 1
        hf_hub_download('owner/name', 'meta/info.json', repo_type='dataset', endpoint=hub.url)
    assert [r.status for r in hub.log if r.method == 'GET'] == [429, 200]

It speaks what huggingface_hub asks for when it reads a dataset or a model: repo_info, list_repo_tree (always
recursive) and hf_hub_download; and when the token TOKEN, of the user `me`, writes: create_repo, auth_check and commits
(READER, of the same user, may not). A revision is main or the commit. Every file comes from here and by plain HTTP, where the real hub sends on to other hosts and to Xet.
"""
import base64
import collections
import hashlib
import http.server
import json
import re
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

ROUTE = re.compile(r'(?:(?:/api)?/datasets|/api/models|(?!/api))/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)/?(.*))?')
AUTH = re.compile('/api/models/[^/]+/[^/]+/auth-check/write')
TOKEN = 'hf_may_write'
READER = 'hf_may_read'
LARGE = '.mp4', '.parquet', '.safetensors', '.png'
# range: '' or as asked for; time: of its start
Request = collections.namedtuple('Request', 'method path range status time')
Fault = collections.namedtuple('Fault', 'part kind seconds keep method headers')


class Hub:
    """A server from `with` to its end. The files under root, page and commits may change."""

    def __init__(self, root):
        self.root = Path(root)
        self.bare = False       # like a mirror whose HEAD says no length, and that knows no ranges
        self.page = 1000        # entries of a tree per answer
        self.commits = {}       # {repo: sha} to stand in for the hash of a repository's files
        self.log = []           # a Request for each answer about a dataset
        self.faults = []        # those not used up yet
        self.blobs = {}         # {hash: content} of large files that have come
        self.over = threading.Event()
        self.lock = threading.Lock()
        answer = type('Answers', (Answer,), {'hub': self})
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), answer)
        self.server.daemon_threads = True
        self.server.block_on_close = False      # closing waits for no client
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    def fail(self, part, kind, times=1, seconds=None, keep=None, method='GET', headers=()):
        """Let the next requests of a method with `part` in their path go wrong.

        kind is a status such as 429 or 503 (with `headers`, and Retry-After if seconds is given),
        'cut' (the connection closes after `keep` bytes of the body, half of it by default; a HEAD
        gets no answer), 'stall' (after `keep` bytes nothing for `seconds`, then the rest) or 'short'
        (a complete answer, but the file's last byte is missing).
        """
        headers = dict(headers)
        if seconds is not None:
            headers['Retry-After'] = str(seconds)
        with self.lock:
            self.faults += [Fault(part, kind, seconds, keep, method, headers)] * times

    def files(self, repo):
        """{name: (content, git's or LFS's hash of it)} of a repository; empty if there is none."""
        files = {}
        for path in sorted((self.root / repo).rglob('*')):
            if path.is_file():
                body = path.read_bytes()
                large = path.suffix in LARGE  # what the hub keeps in LFS by default
                oid = hashlib.sha1(b'blob %d\0' % len(body) + body)
                oid = hashlib.sha256(body) if large else oid
                files[path.relative_to(self.root / repo).as_posix()] = body, oid.hexdigest()
        return files

    def commit(self, repo):
        hashes = {name: oid for name, (_, oid) in self.files(repo).items()}
        return self.commits.get(repo) or hashlib.sha1(json.dumps(hashes).encode()).hexdigest()


class Answer(http.server.BaseHTTPRequestHandler):
    timeout = 60  # seconds, for a client that never finishes its request

    def do_GET(self):
        self.began = time.monotonic()
        self.url = urlsplit(self.path)
        self.where = unquote(self.url.path)
        if AUTH.fullmatch(self.url.path):
            self.fault = Fault('', '', 0, None, '', {})
            return self.json({}) if self.may_write() else None
        match = ROUTE.fullmatch(self.url.path)
        if not match:  # such as the client's own news, which no test is about
            return self.send_error(404)
        with self.hub.lock:
            hits = (f for f in self.hub.faults if f.part in self.where and f.method == self.command)
            self.fault = next(hits, Fault('', '', 0, None, '', {}))
            if self.fault.kind:
                self.hub.faults.remove(self.fault)
        if isinstance(self.fault.kind, int):
            return self.answer(self.fault.kind, b'{"error": "a fault on order"}', self.fault.headers)
        repo, what, revision, name = (unquote(text or '') for text in match.groups())
        files = self.hub.files(repo)
        sha = self.hub.commit(repo)
        if not files:
            self.answer(404, headers={'X-Error-Code': 'RepoNotFound'})
        elif revision not in ('', 'main', sha):
            self.answer(404, headers={'X-Error-Code': 'RevisionNotFound'})
        elif what == 'resolve' and name in files:
            self.file(*files[name], sha)
        elif what == 'tree' and (not name or any(file.startswith(name + '/') for file in files)):
            self.tree(files, name and name + '/')
        elif what in ('', 'revision'):
            self.json({'id': repo, 'sha': sha, 'siblings': [{'rfilename': file} for file in files],
                       'private': False, 'downloads': 0, 'likes': 0, 'tags': []})
        else:
            self.answer(404, headers={'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': sha})

    do_HEAD = do_GET

    def do_POST(self):
        self.began = time.monotonic()
        self.where = unquote(urlsplit(self.path).path)
        if 'Content-Length' in self.headers:
            body = self.rfile.read(int(self.headers['Content-Length']))
        else:       # in chunks
            body = b''
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.fault = Fault('', '', 0, None, '', {})
        with self.hub.lock:
            hits = [f for f in self.hub.faults if f.part in self.where and f.method == self.command]
            for fault in hits[:1]:
                self.hub.faults.remove(fault)
        if hits:
            return self.answer(hits[0].kind, b'{"error": "a fault on order"}', hits[0].headers)
        if self.where.startswith('/lfs/'):          # where a large file goes; the address is the permission
            self.hub.blobs[self.where[5:]] = body
            return self.json({})
        if not self.may_write():
            return
        if self.where.endswith('/validate-yaml'):
            return self.json({'warnings': [], 'errors': []})
        if '/commit/' in self.where:
            return self.commit([json.loads(line) for line in body.splitlines()])
        asked = json.loads(body)
        if self.where == '/api/repos/create':
            owner = asked['organization'] or 'me'
            folder = self.hub.root / owner / asked['name']
            if owner != 'me':
                return self.answer(403, b'{"error": "no rights"}')
            if folder.exists():
                return self.answer(409, json.dumps({'url': f'{self.hub.url}/{owner}/{asked["name"]}'}).encode())
            folder.mkdir(parents=True)
            self.json({'url': f'{self.hub.url}/{owner}/{asked["name"]}'})
        elif '/preupload/' in self.where:
            self.json({'files': [{'path': f['path'], 'shouldIgnore': False,
                                  'uploadMode': 'lfs' if f['path'].endswith(LARGE) else 'regular'} for f in asked['files']]})
        else:       # git LFS: what has come already is not asked for
            objects = [{'oid': o['oid'], 'size': o['size']} for o in asked['objects']]
            for o in objects:
                if o['oid'] not in self.hub.blobs:
                    o['actions'] = {'upload': {'href': f'{self.hub.url}/lfs/{o["oid"]}'}}
            self.json({'objects': objects})

    do_PUT = do_POST

    def may_write(self):
        """Of the token that came; otherwise that is the answer."""
        token = self.headers.get('Authorization')
        if token == f'Bearer {READER}':
            self.answer(403, b'{"error": "this token does not write"}')
        elif token != f'Bearer {TOKEN}':
            self.answer(401, b'{"error": "Invalid username or password."}')
        return token == f'Bearer {TOKEN}'

    def commit(self, entries):
        repo = re.fullmatch('/api/models/(.*)/commit/main', self.where)[1]
        for entry in entries:
            value = entry['value']
            if entry['key'] == 'file':
                (self.hub.root / repo / value['path']).write_bytes(base64.b64decode(value['content']))
            elif entry['key'] == 'lfsFile':
                (self.hub.root / repo / value['path']).write_bytes(self.hub.blobs[value['oid']])
        self.json({'commitUrl': f'{self.hub.url}/{repo}/commit/0', 'commitOid': self.hub.commit(repo)})

    def tree(self, files, folder):
        """All files and folders under `folder` ('' or with a slash), in pages that name the next one."""
        paths = set(files)
        for name in files:
            paths |= {parent.as_posix() for parent in Path(name).parents}
        entries = []
        for path in sorted(p for p in paths - {'.'} if p.startswith(folder)):
            body, oid = files.get(path, (b'', '0' * 40))
            kind = 'file' if path in files else 'directory'
            entries.append({'type': kind, 'path': path, 'oid': oid, 'size': len(body)})
            if len(oid) == 64:
                entries[-1]['lfs'] = {'oid': oid, 'size': len(body), 'pointerSize': 130}
        start = int(parse_qs(self.url.query).get('cursor', ['0'])[0])
        stop = start + self.hub.page
        more = f'<{self.hub.url}{self.url.path}?recursive=True&cursor={stop}>; rel="next"'
        self.json(entries[start:stop], {'Link': more} if stop < len(entries) else {})

    def json(self, value, headers=()):
        self.answer(200, json.dumps(value).encode(), headers)

    def file(self, body, oid, sha):
        headers = {'X-Repo-Commit': sha, 'ETag': f'"{oid}"', 'X-Linked-ETag': f'"{oid}"',
                   'X-Linked-Size': len(body)}
        size = len(body)
        if self.fault.kind == 'short':
            size -= 1
        span = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if not span or self.hub.bare:
            return self.answer(200, body[:size], {} if self.hub.bare else headers)
        start = int(span[1])
        stop = min(int(span[2] or size) + 1, size)
        if start >= stop:
            return self.answer(416, b'', headers | {'Content-Range': f'bytes */{size}'})
        headers['Content-Range'] = f'bytes {start}-{stop - 1}/{size}'
        self.answer(206, body[start:stop], headers)

    def answer(self, status, body=b'', headers=()):
        kind = self.fault.kind
        seconds = self.fault.seconds
        keep = self.fault.keep
        if kind not in ('cut', 'stall'):
            keep = len(body)
        elif keep is None:
            keep = len(body) // 2
        span = self.headers.get('Range', '')
        with self.hub.lock:
            self.hub.log.append(Request(self.command, self.where, span, status, self.began))
        if self.command == 'HEAD' and (kind == 'cut' or kind == 'stall' and self.hub.over.wait(seconds)):
            return
        try:
            self.send_response(status)
            if self.command != 'HEAD' or not self.hub.bare:
                headers = {'Content-Length': len(body), **dict(headers)}
            for header in dict(headers).items():
                self.send_header(*header)
            self.end_headers()
            if self.command != 'HEAD':
                self.wfile.write(body[:keep])
                if kind == 'stall' and not self.hub.over.wait(seconds):
                    self.wfile.write(body[keep:])
        except ConnectionError:  # the client gave up
            pass

    def log_message(self, *args):
        pass
