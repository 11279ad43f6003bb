"""How long notebooks run: `python docs/timing.py 01_schedules evidence/fig7 …` notes their seconds in times.json.

Processor seconds of one thread are counted, since other work on a machine lengthens the seconds on the clock alone."""
import json, os, platform, sys, tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TIMES = HERE/'times.json'


def spent() -> float: # processor seconds of processes that have ended
    now = os.times()
    return now.children_user + now.children_system


def measured(path: Path) -> float: # processor seconds of one clean run
    import nbformat
    from nbclient import NotebookClient
    notebook, before = nbformat.read(path, 4), spent()
    NotebookClient(notebook, timeout=1200, resources={'metadata': {'path': str(path.parent)}}).execute()
    return spent() - before


def seconds(path: Path = TIMES) -> dict[str, float]: # notebook -> processor seconds
    return json.loads(path.read_text(encoding='utf-8'))['processor_seconds'] if path.is_file() else {}


def note(found: dict[str, float], path: Path = TIMES) -> None:
    "Adds measurements to the file, which is written aside and renamed."
    times = {name: round(value, 1) for name, value in sorted((seconds(path) | found).items())}
    machine = f'{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS=1'
    text = json.dumps({'machine': machine, 'processor_seconds': times}, indent=1)
    with tempfile.NamedTemporaryFile('w', dir=path.parent, delete=False, encoding='utf-8') as file:
        file.write(text + '\n')
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


if __name__ == '__main__':
    os.environ['OMP_NUM_THREADS'] = '1'
    for name in sys.argv[1:]:
        note({name: measured(HERE.parent/f'nbs/{name}.ipynb')})
        print(name, f'{seconds()[name]:.0f} s', flush=True)
