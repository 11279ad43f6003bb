"What an import loads, and what it leaves for later."
import subprocess, sys
import pytest

HEAVY = ('matplotlib', 'scipy', 'torchmetrics', 'psutil', 'ipywidgets', 'accelerate', 'diffusers', 'transformers', 'bitsandbytes', 'PIL')


def fresh(code):
    "What a new Python prints."
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
    return done.stdout.split()


def test_the_librarys_modules_load_no_heavy_library():
    modules = 'core, plots, provenance, imports, folders, text, hub, pipeline, lora, int8'
    assert fresh(f'import sys; import pixart_delta_nb; from pixart_delta_nb import {modules}; print(*(m for m in {HEAVY} if m in sys.modules))') == []


def test_an_autoencoder_comes_without_bitsandbytes_and_without_its_warning():
    code = '''import sys; from pixart_delta_nb.folders import autoencoder_class
autoencoder_class(); print('bitsandbytes' in sys.modules, 'torch._inductor.compile_fx' in sys.modules)'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.split() == ['False', 'False'] and 'gemm' not in done.stderr


def test_bitsandbytes_is_the_real_one_for_whoever_asks():
    pytest.importorskip('bitsandbytes')
    code = '''import sys; from pixart_delta_nb.folders import autoencoder_class
autoencoder_class()
from diffusers.quantizers.bitsandbytes import utils
real = utils.bnb.nn.Linear8bitLt
import bitsandbytes
print(real is bitsandbytes.nn.Linear8bitLt, type(bitsandbytes).__name__, bitsandbytes.__version__ == utils.bnb.__version__)'''
    assert fresh(code) == ['True', 'module', 'True']


def test_the_stand_in_leaves_a_loaded_or_absent_module_alone():
    code = '''import sys, json; from pixart_delta_nb.imports import later
with later('json'): import json as same
with later('a_module_that_is_not_there'): pass
with later('wave'):
    import wave
    print('wave' in sys.modules, hasattr(wave, '__path__'))
print(same is json, 'wave' in sys.modules, wave.Error.__name__, sys.modules['wave'].Error is wave.Error)'''
    assert fresh(code) == ['True', 'False', 'True', 'False', 'Error', 'True']
