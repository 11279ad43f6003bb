"""The public names of the package as its source states them: signature, docments, docstring, and their tests."""
import ast, io, re, tokenize
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = 'pixart_delta_nb'


@dataclass
class Argument:
    name: str
    annotation: str # '' where there is none
    default: str # '' where it must be given
    comment: str # its docment


@dataclass
class Public:
    """One public name of one module."""
    module: str # without the package: 'solvers', 'evidence.kit'
    name: str
    kind: str # 'function', 'class' or 'data'
    signature: str # '(x_t, alpha_bar)', or the value of data
    arguments: list[Argument]
    returns: Argument | None
    doc: str
    methods: list['Public'] = field(default_factory=list)
    decorators: set[str] = field(default_factory=set)

    @property
    def path(self): return f'{PACKAGE}.{self.module}.{self.name}' # as it is imported


def comments(source: str) -> dict[int, str]: # line -> text of the comment that ends it
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip('# ').strip() for t in tokens if t.type == tokenize.COMMENT}


def text_of(node: ast.AST | None) -> str: return ast.unparse(node) if node else ''


def arguments_of(args: ast.arguments, notes: dict[int, str]) -> list[Argument]:
    "Arguments in the order of the signature, each with the comment on its line where it has that line to itself."
    plain = args.posonlyargs + args.args
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
    rest = [[(a, None)] if a else [] for a in (args.vararg, args.kwarg)]
    pairs = [*zip(plain, defaults), *rest[0], *zip(args.kwonlyargs, args.kw_defaults), *rest[1]]
    lines = [a.lineno for a, _ in pairs]
    star = {id(args.vararg): '*', id(args.kwarg): '**'}
    comment = lambda a: notes.get(a.lineno, '') if lines.count(a.lineno) == 1 else ''
    return [Argument(star.get(id(a), '') + a.arg, text_of(a.annotation), text_of(default), comment(a))
            for a, default in pairs if a.arg not in ('self', 'cls')]


def written(node: ast.FunctionDef) -> str: # the signature on one line
    copy = ast.parse(ast.unparse(node)).body[0]
    copy.args.args = [a for a in copy.args.args if a.arg not in ('self', 'cls')]
    return f'({ast.unparse(copy.args)})' + (f' -> {ast.unparse(node.returns)}' if node.returns else '')


def result(node: ast.FunctionDef, notes: dict[int, str]) -> Argument | None:
    if node.returns is None: return None
    alone = node.returns.lineno not in {a.lineno for a in (*node.args.args, *node.args.kwonlyargs)}
    return Argument('return', ast.unparse(node.returns), '', notes.get(node.returns.lineno, '') if alone else '')


def function(module: str, node: ast.FunctionDef, notes: dict[int, str], prefix: str = '') -> Public:
    arguments, doc = arguments_of(node.args, notes), ast.get_docstring(node) or ''
    found = Public(module, prefix + node.name, 'function', written(node), arguments, result(node, notes), doc)
    for decorator in node.decorator_list: found.decorators |= words(decorator)
    return found


def class_(module: str, node: ast.ClassDef, notes: dict[int, str]) -> Public:
    "A class with its public methods; its arguments are those of `__init__`, or the fields of a dataclass."
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    start = next((m for m in methods if m.name == '__init__'), None)
    fields = [Argument(n.target.id, text_of(n.annotation), text_of(n.value), notes.get(n.lineno, ''))
              for n in node.body if isinstance(n, ast.AnnAssign)]
    arguments = arguments_of(start.args, notes) if start else fields
    signature = '(' + ', '.join(a.name + (f'={a.default}' if a.default else '') for a in arguments) + ')'
    public = [function(module, m, notes, node.name + '.') for m in methods if not m.name.startswith('_')]
    return Public(module, node.name, 'class', signature, arguments, None, ast.get_docstring(node) or '', public)


def data(module: str, name: str, node: ast.AST, notes: dict[int, str]) -> Public:
    value = ast.unparse(node.value) if getattr(node, 'value', None) else ''
    return Public(module, name, 'data', value, [], None, notes.get(node.lineno, '') or notes.get(node.end_lineno, ''))


def targets(node: ast.AST) -> list[str]: # names that a statement at the top of a module gives a value
    found = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for t in found for n in ast.walk(t) if isinstance(n, ast.Name)]


def exported(tree: ast.Module) -> list[str]: # the names of __all__
    for node in tree.body:
        if targets(node) == ['__all__'] and isinstance(node.value, ast.List): return [e.value for e in node.value.elts]
    return []


def read_module(path: Path, root: Path = ROOT) -> tuple[str, list[Public]]: # the module's docstring; its public names
    source = path.read_text(encoding='utf-8')
    tree, notes = ast.parse(source), comments(source)
    module = '.'.join(path.relative_to(root/PACKAGE).with_suffix('').parts)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef): found[node.name] = function(module, node, notes)
        elif isinstance(node, ast.ClassDef): found[node.name] = class_(module, node, notes)
        else: found |= {name: data(module, name, node, notes) for name in targets(node)}
    return ast.get_docstring(tree) or '', [found[name] for name in exported(tree) if name in found]


def modules(root: Path = ROOT) -> dict[str, tuple[str, list[Public]]]: # module -> (docstring, public names)
    paths = sorted(p for p in (root/PACKAGE).rglob('*.py') if p.stem not in ('__init__', '_modidx'))
    return {'.'.join(p.relative_to(root/PACKAGE).with_suffix('').parts): read_module(p, root) for p in paths}


def words(node: ast.AST) -> set[str]: # names and attributes below a node
    nodes = list(ast.walk(node))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


def imported(tree: ast.Module) -> set[str]: # modules of the package that a file imports from, without the package
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == PACKAGE:
            base = node.module.partition('.')[2]
            found |= {base} | {f'{base}.{a.name}'.strip('.') for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition('.')[2] for a in node.names if a.name.startswith(PACKAGE)}
    return found


def uses(tree: ast.Module) -> dict[str, set[str]]: # test -> words that it uses, through the helpers of its own file too
    own = {}
    for node in tree.body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else targets(node)
        own |= {name: words(node) for name in names}
    def closed(name, seen): # follows helpers
        found = set(own[name])
        for other in own[name] & own.keys() - seen: found |= closed(other, seen | own[name])
        return found
    return {name: closed(name, {name}) for name in own if name.startswith('test_')}


def tests(names: list[Public], root: Path = ROOT) -> dict[str, list[tuple[str, str]]]:
    "Path of a name -> the tests that use it, as (file of tests, test)."
    found = {}
    for path in sorted((root/'tests').rglob('test_*.py')):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        near, used = imported(tree), uses(tree)
        known = [n for n in names if n.module in near]
        file = str(path.relative_to(root/'tests').with_suffix(''))
        for test, seen in used.items():
            for name in known:
                if name.name in seen: found.setdefault(name.path, []).append((file, test))
    return found


def section_of(doc: str) -> list[str]: # places of the report that a docstring names: 'Algorithm 1', '§3.3', 'Figure 7'
    return list(dict.fromkeys(re.findall(r'§\s?\d+(?:\.\d+)*|Algorithm \d|(?:Figure|Fig\.|Table) \d+', doc)))
