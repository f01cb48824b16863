"""Do the exercises notice wrong answers? In a copy of the repository, every function of the table
"Write it yourself" in the README gets wrong bodies, one after the other, and the command of its row
is run. It must pass with the real body, and fail with each of these: one that raises
NotImplementedError, none at all (so that the function returns None), one that returns zeros or the
nearest thing to them (ZEROS), and typical mistakes (MISTAKES).

    python tests/tools/wrong_answers.py                       # all of them, in about ten minutes
    python tests/tools/wrong_answers.py attention find_pair   # those whose command ends with these words
    python tests/tools/wrong_answers.py attention --messages  # and show what a learner would read
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("real", "raises", "nothing", "zeros", "mistakes")  # of the table that is printed

ZEROS = {
    "cross_entropy": "return torch.zeros(())",
    "count_bigrams": "return BigramLanguageModel(BigramConfig(vocab_size))",
    "get_batch": """
        x = torch.zeros(config.batch_size, config.block_size, dtype=torch.long)
        return x, x""",
    "generate": """
        for _ in range(max_new_tokens):
            yield torch.zeros_like(idx[:, :1])""",
    "LayerNorm.forward": "return torch.zeros_like(x)",
    "GELU.forward": "return torch.zeros_like(x)",
    "attention": "return torch.zeros_like(v)",
    "CausalSelfAttention.forward": "return torch.zeros_like(x)",
    "Block.forward": "return torch.zeros_like(x)",
    "Adam.update": "return torch.zeros_like(grads)",
    "orthogonalize": "return torch.zeros_like(x)",
    "training_step": "return 0.0",
    "find_pair": "return np.array([0])",
    "train_bpe": "return BPETokenizer([bytes([b]) for b in range(256)] + [END_OF_TEXT.encode()])",
    "encode_word": "return [0] * len(word)",
    "Cache.append": """
        B, n_head, T, head_size = k.shape
        self.length += T
        zeros = k.new_zeros(B, n_head, self.length, head_size)
        return zeros, zeros""",
    "encode_record": """
        text = make_prompt(record) + record["output"]
        zeros = torch.zeros(len(tokenizer.encode(text)), dtype=torch.long)
        return zeros, zeros""",
    "choose": "return torch.zeros(len(logits), 1, dtype=torch.long)",
    "beam_search": "return [[0] * max_new_tokens for _ in range(width)]",
}

# A mistake is a part of the real body and what stands in its place; or, with no such part, a body.
MISTAKES = {
    "cross_entropy": {
        "softmax over the positions": ("log_softmax(dim=-1)", "log_softmax(dim=1)"),
        "the sum, not the mean": (".mean()", ".sum()"),
        "no minus": ("-log_probs_of_targets.mean()", "log_probs_of_targets.mean()"),
        "no softmax": ("logits.log_softmax(dim=-1)", "logits"),
        "exp of large scores": ("logits.log_softmax(dim=-1)", "logits.softmax(dim=-1).log()"),
    },
    "count_bigrams": {
        "rows and columns exchanged": (
            "data[:-1] * vocab_size + data[1:]", "data[1:] * vocab_size + data[:-1]"),
        "no logarithm": (".log()", ".float()"),
        "nothing is added": ("counts + add", "counts"),
    },
    "get_batch": {
        "targets are the inputs": ("rows[:, 1:]", "rows[:, :-1]"),
        "targets are one token earlier": (
            "rows[:, :-1], rows[:, 1:]", "rows[:, 1:], rows[:, :-1]"),
        "not shuffled": ("rng.permutation(n_windows)", "range(n_windows)"),
        "windows overlap": ("offset + T * n", "offset + n"),
        "every epoch is the same": ("(config.seed, epoch)", "config.seed"),
        "no random offset": ("rng.integers(len(data) - n_windows * T)", "0"),
        "no seed": ("np.random.default_rng((config.seed, epoch))", "np.random.default_rng()"),
    },
    "generate": {
        "scores of the first position": ("logits[:, -1]", "logits[:, 0]"),
        "earlier tokens are forgotten": ("torch.cat((idx, new), dim=1)", "new"),
        "more tokens than fit": ("idx[:, -model.context_size :]", "idx"),
        "nothing is appended": ("torch.cat((idx, new), dim=1)", "idx"),
        "in training mode": ("model.eval()", "model.train()"),
        "always the likeliest": ("choose(logits[:, -1])", "logits[:, -1:].argmax(dim=-1)"),
    },
    "LayerNorm.forward": {
        "unbiased variance": (
            "((x - mean) ** 2).mean(dim=-1, keepdim=True)", "x.var(dim=-1, keepdim=True)"),
        "mean over the tokens": ("x.mean(dim=-1, keepdim=True)", "x.mean(dim=1, keepdim=True)"),
        "no square root": ("torch.sqrt(variance + 1e-5)", "(variance + 1e-5)"),
        "division by zero": ("variance + 1e-5", "variance"),
        "1e-5 after the root": ("torch.sqrt(variance + 1e-5)", "torch.sqrt(variance) + 1e-5"),
        "no gain, no bias": (" * self.weight + self.bias", ""),
    },
    "GELU.forward": {
        "a square, not a cube": ("x**3", "x**2"),
        "no cube": ("x + 0.044715 * x**3", "x"),
        "the exact function": ("", "return x * (1 + torch.erf(x / math.sqrt(2))) / 2"),
        "ReLU": ("", "return x.clamp(min=0)"),
    },
    "attention": {
        "no mask": ("masked_fill(~visible, -math.inf)", "clone()"),
        "masked scores of 0": ("-math.inf", "0.0"),
        "the future, not the past": (".tril()", ".triu()"),
        "not even itself": (".tril()", ".tril(-1)"),
        "masked after the softmax": ("", """
            weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
            return weights.tril() @ v"""),
        "not divided by the root": (" / math.sqrt(head_size)", ""),
        "divided by head_size": ("/ math.sqrt(head_size)", "/ head_size"),
        "softmax over the queries": ("softmax(dim=-1)", "softmax(dim=-2)"),
        "queries and keys exchanged": ("q @ k.transpose(-2, -1)", "k @ q.transpose(-2, -1)"),
    },
    "CausalSelfAttention.forward": {
        "no mask": ("is_causal=True", "is_causal=False"),
        "not transposed back": ("y.transpose(1, 2).reshape", "y.reshape"),
        "no c_proj": ("self.c_proj(y)", "y"),
        "keys before queries": ("q, k, v = self.c_attn", "k, q, v = self.c_attn"),
        "values first": ("q, k, v = self.c_attn", "v, q, k = self.c_attn"),
        "cut without transpose": (
            "q.view(B, T, self.n_head, head_size).transpose(1, 2)",
            "q.reshape(B, self.n_head, T, head_size)"),
        "a single head": ("head_size = C // self.n_head", "self.n_head = 1\nhead_size = C"),
    },
    "Block.forward": {
        "attention replaces x": ("x = x + self.attn", "x = self.attn"),
        "mlp replaces x": ("x = x + self.mlp", "x = self.mlp"),
        "one layer norm twice": ("self.ln_2(x)", "self.ln_1(x)"),
        "norm after the sum": ("", """
            x = self.ln_1(x + self.attn(x))
            return self.ln_2(x + self.mlp(x))"""),
        "in parallel": ("", """
            a = self.attn(self.ln_1(x))
            return x + a + self.mlp(self.ln_2(x))"""),
    },
    "Adam.update": {
        "no square root": ("v_hat.sqrt()", "v_hat"),
        "no correction of m": ("m / (1 - self.beta1**self.n_steps)", "m"),
        "no correction of v": ("v / (1 - self.beta2**self.n_steps)", "v"),
        "the correction of the first step in every step": ("self.beta1**self.n_steps", "self.beta1"),
        "no eps": (" + self.eps", ""),
        "means are not kept": ("m.lerp_(grads, 1 - self.beta1)", "m = m.lerp(grads, 1 - self.beta1)"),
        "weights exchanged": ("m.lerp_(grads, 1 - self.beta1)", "m.lerp_(grads, self.beta1)"),
        "v is a mean of gradients": ("v.lerp_(grads**2,", "v.lerp_(grads,"),
        "the gradient, not its mean": ("return m_hat", "return grads"),
    },
    "orthogonalize": {
        "not divided by the length": (
            "x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)", "x"),
        "division by zero": (".clamp(min=1e-7)", ""),
        "the length of all matrices together": (
            "x.norm(dim=(-2, -1), keepdim=True)", "x.norm()"),
        "no third power": ("beta=-4.7750", "beta=0.0"),
        "no fifth power": ("alpha=2.0315", "alpha=0.0"),
        "the wrong square": ("torch.bmm(x, x.mT)", "torch.bmm(x.mT, x)"),
        "one round": ("range(rounds)", "range(min(rounds, 1))"),
        "not transposed back": ("return x.mT if is_tall else x", "return x"),
        "singular values of 1": ("", """
            U, S, Vt = torch.linalg.svd(x, full_matrices=False)
            return U @ Vt"""),
    },
    "training_step": {
        "no warmup": ("min(warmup, 1 -", "(1 -"),
        "no decay": ("min(warmup, 1 - step / config.max_iters)", "min(warmup, 1)"),
        "a product": ("min(warmup, 1 -", "warmup * (1 -"),
        "warmup begins at 0": ("(step + 1) /", "step /"),
        "a cosine, not a line": (
            "1 - step / config.max_iters", "math.cos(math.pi / 2 * step / config.max_iters) ** 2"),
        "no schedule": ("optimizer.step(multiplier)", "optimizer.step()"),
        "gradients add up": ("model.zero_grad()", "pass"),
        "no clipping": (
            "nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)",
            "torch.zeros(())"),
        "the optimizers make no step": ("optimizer.step(multiplier)", "pass"),
        "only the first optimizer makes a step": (
            "optimizer.step(multiplier)", "optimizers[0].step(multiplier)\n    break"),
    },
    "find_pair": {
        "pairs overlap": ("not starts or i > starts[-1] + 1", "True"),
        "only the first": ("return np.array(starts)", "return np.array(starts[:1])"),
        "the tokens after": ("return np.array(starts)", "return np.array(starts) + 1"),
        "in either order": ("(ids[:-1] == pair[0]) & (ids[1:] == pair[1])",
                            "np.isin(ids[:-1], pair) & np.isin(ids[1:], pair)"),
        "one of the two": ("(ids[:-1] == pair[0]) & (ids[1:] == pair[1])", "ids[:-1] == pair[0]"),
        "one apart": ("starts[-1] + 1", "starts[-1] + 2"),
    },
    "train_bpe": {
        "pairs that occur once": ("pair_counts[pair] > 1", "pair_counts[pair] > 0"),
        "one token too many": ("vocab_size - 1", "vocab_size"),
        "the higher number in a tie": (
            "heapq.heappop(heap)",
            "[heap.sort(), heap.pop(max(i for i, e in enumerate(heap) if e[0] == heap[0][0]))][1]"),
        "each word counts once": ("sign * n", "sign"),
        "no words": ("regex.findall(WORDS, text)", "[text]"),
        "counts that have changed": ("pair_counts[pair] != -count", "False"),
        "nothing is taken back": ("[starts - 1, starts, starts + 1]), -1", "[starts]), -1"),
    },
    "encode_word": {
        "the first pair that is a token": (
            "best = min(merged, key=lambda token: ranks.get(token, math.inf))",
            "best = next((token for token in merged if token in ranks), b'')"),
        "the highest number": (
            "min(merged, key=lambda token: ranks.get(token, math.inf))",
            "max(merged, key=lambda token: ranks.get(token, -1))"),
        "only one merge": ("parts[i : i + 2] = [best]", "parts[i : i + 2] = [best]\n    break"),
        "the last of equal pairs": (
            "merged.index(best)", "len(merged) - 1 - merged[::-1].index(best)"),
        "the longest token": ("", """
            ids = []
            while word:
                n = max(n for n in range(1, len(word) + 1) if word[:n] in ranks)
                ids.append(ranks[word[:n]])
                word = word[n:]
            return ids"""),
        "the tokens, not their numbers": (
            "return [ranks[part] for part in parts]", "return parts"),
    },
    "Cache.append": {
        "overwrites from 0": (
            "self.k[:, :, self.length : S] = k", "self.k[:, :, : k.shape[2]] = k"),
        "does not count": ("self.length = S", "pass"),
        "all places, also empty ones": ("self.k[:, :, :S]", "self.k"),
        "only the new ones": ("return self.k[:, :, :S], self.v[:, :, :S]", "return k, v"),
        "keys as values": (
            "self.v[:, :, self.length : S] = v", "self.v[:, :, self.length : S] = k"),
        "counts one per call": ("self.length = S", "self.length += 1"),
    },
    "encode_record": {
        "first token of the response left out": ("len(prompt) - 1", "len(prompt)"),
        "the prompt is learned": ("= -100", "= y[: len(prompt) - 1]"),
        "no end of text": (" + [tokenizer.end_of_text]", ""),
        "no copy": ("tokens[1:].clone()", "tokens[1:]"),
        "targets not shifted": ("tokens[1:].clone()", "tokens[:-1].clone()"),
    },
    "choose": {
        "top_p cuts the token that reaches it": (
            "probs.cumsum(dim=-1) - probs >= config.top_p", "probs.cumsum(dim=-1) >= config.top_p"),
        "top_p can cut all": ("tail[:, 0] = False", "pass"),
        "ranks, not tokens": ("tokens.gather(-1, ranks)", "ranks"),
        "multiplied by the temperature": ("/ config.temperature", "* config.temperature"),
        "top_k one too many": ("logits[:, config.top_k :]", "logits[:, config.top_k + 1 :]"),
        "min_p of 1, not of the highest": ("config.min_p * probs[:, :1]", "config.min_p"),
        "no top_p": ("config.top_p < 1", "False"),
        "no temperature": (" / config.temperature", ""),
    },
    "beam_search": {
        "caches are not reordered": (
            "cache.k = cache.k[parents[~done]]",
            "cache.k = cache.k[torch.arange(len(texts)) % len(cache.k)]"),
        "only the last score counts": ("totals = scores + logits", "totals = logits"),
        "ranked by the sum": ("best[done] / n", "best[done]"),
        "the worst first": ("reverse=True", "reverse=False"),
        "goes on after the end": ("(tokens == end)", "(tokens == -2)"),
        "a text with the token of another": ("texts[parents]", "texts[parents.sort().values]"),
        "keeps only one text": ("min(width, totals.numel())", "1"),
    },
}

Row = namedtuple("Row", "function, script, task, time, command")


def rows_of_the_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Write it yourself\n")[1].split("\n## ")[0]
    row = r"^\| `([\w.]+)` in `([\w/]+\.py)` \| (.+?) \| (\d+ min) \| `(.+?)` \|$"
    return [Row(*cells) for cells in re.findall(row, section, re.MULTILINE)]


def find(tree, name):
    """The definition of a function, `f`, or of a method, `C.f`."""
    for part in name.split("."):
        (tree,) = [node for node in tree.body if getattr(node, "name", None) == part]
    return tree


def with_body(source, name, change):
    """The source of a script, in which a function has another body, below its docstring. `change`
    is given the lines of the real body, without indentation, and returns others."""
    node = find(ast.parse(source), name)
    lines = source.splitlines(keepends=True)
    first = node.body[0]
    start = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
    body = textwrap.dedent("".join(lines[start : node.end_lineno]))
    indent = " " * (node.col_offset + 4)
    body = textwrap.indent(textwrap.dedent(change(body)).strip("\n"), indent) + "\n"
    return "".join(lines[:start]) + body + "".join(lines[node.end_lineno :])


def replace(body, old, new):
    """The body with a mistake in it."""
    if not old:
        return new
    if body.count(old) != 1:
        raise ValueError(f"{old!r} is in the body {body.count(old)} times, not once:\n{body}")
    return body.replace(old, new)


def wrong_versions(row):
    """The script with each wrong body: {(column of the table, description): source}."""
    source = (ROOT / row.script).read_text(encoding="utf-8")
    bodies = {
        ("raises", "NotImplementedError"): "raise NotImplementedError",
        ("nothing", "no body"): "pass",
        ("zeros", "zeros"): ZEROS[row.function],
    }
    versions = {}
    for key, body in bodies.items():
        versions[key] = with_body(source, row.function, lambda _: body)
    for name, (old, new) in MISTAKES[row.function].items():
        versions["mistakes", name] = with_body(
            source, row.function, lambda body: replace(body, old, new))
    return versions


def copy_repository(folder):
    """What the commands need: the scripts and the tests."""
    (folder / "data").mkdir()
    for script in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
        shutil.copy(script, folder / script.relative_to(ROOT))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))


def run(command, folder):
    """The status and the output of a row's command in a folder."""
    words = shlex.split(command)
    words[0] = sys.executable  # for "python"
    env = {"TIKTOKEN_CACHE_DIR": str(ROOT / "data" / "tiktoken"), "OMP_NUM_THREADS": "1"}
    # No file of compiled code: two versions of a script can have the same size and second.
    env |= {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "100"}
    done = subprocess.run(
        words, cwd=folder, env=env, capture_output=True, encoding="utf-8", errors="replace")
    return done.returncode, done.stdout + done.stderr


def try_exercise(row, folder):
    """Run the command with the real body and with the wrong ones. Yields for each the column of the
    table, a description, whether the command ended as it should, its output, and the seconds."""
    script = folder / row.script
    original = script.read_text(encoding="utf-8")
    versions = {("real", "the real body"): original} | wrong_versions(row)
    for (column, description), source in versions.items():
        script.write_text(source, encoding="utf-8")
        started = time.perf_counter()
        status, output = run(row.command, folder)
        seconds = time.perf_counter() - started
        expected = 0 if column == "real" else 1  # 1: a test failed; others: no test could be run
        yield column, description, status == expected, output, seconds
    script.write_text(original, encoding="utf-8")


def print_row(row, results):
    """How many of the bodies of a column did as the column should, and the seconds of the first."""
    line = f"{row.function:29}"
    for column in COLUMNS:
        right = [is_right for name, _, is_right, _, _ in results if name == column]
        word = "pass" if column == "real" else "fail"
        line += f"{sum(right)} of {len(right)} {word}".ljust(15)
    print(f"{line}{results[0][4]:7.1f}", flush=True)


def main():
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    rows = [row for row in rows_of_the_table() if not words or row.command.split()[-1] in words]
    print(f"{'exercise':29}{''.join(f'{column:15}' for column in COLUMNS)}seconds")
    n_wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        copy_repository(Path(folder))
        for row in rows:
            results = list(try_exercise(row, Path(folder)))
            print_row(row, results)
            for _, description, is_right, output, _ in results:
                n_wrong += not is_right
                if not is_right or "--messages" in sys.argv:
                    print(f"\n--- {row.function}: {description}\n{output}", flush=True)
    if n_wrong:
        sys.exit(f"{n_wrong} commands did not end as they should")


if __name__ == "__main__":
    main()
