"""PixArt-δ from first principles. The names below load what they need when they are first used."""
__version__ = "0.1.0"

_HOMES = {
    'pipeline': ('Pipeline', 'load_pipeline', 'save_pipeline', 'to_diffusers'),
    'sampling': ('generate', 'to_pil', 'sample_student', 'sample_teacher'),
    'data': ('precompute', 'open_latents'),
    'stages': ('distill', 'distill_lora', 'train_control'),
    'lora': ('apply_lora',),
    'lcd': ('lcd_step', 'lcd_train'),
    'consistency': ('consistency_function',),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f'{__name__} has no {name}; the front door has {", ".join(_HOME)}: '
                             'import the rest from its module.')
    from importlib import import_module
    value = globals()[name] = getattr(import_module(f'.{_HOME[name]}', __name__), name)
    return value


def __dir__(): return sorted([*globals(), *_HOME])
