// GPT-2 in JavaScript, with the names of char_gpt.py and bpe_gpt.py: tokens, the forward pass, and
// sampling. It is part of the page that `python sample.py --explore TEXT` makes from explore.html,
// and `data` is what sample.py writes into that page.

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

// ---- Tokens -------------------------------------------------------------------------------------
// data.tokens has the bytes of each token, as a string with a letter for each byte.

const ranks = new Map((data.tokens ?? []).map((token, id) => [token, id]));
const toBytes = (text) => String.fromCharCode(...new TextEncoder().encode(text));
const pattern = (data.words ?? "[^]").replaceAll("\\s", "\\p{White_Space}")
  .replaceAll("\\S", "\\P{White_Space}"); // JavaScript's \s has other characters

function encode(text) {
  const end = "<|endoftext|>"; // in a text, it is the end-of-text token
  const parts = data.words ? text.split(/(<\|endoftext\|>)/) : [text]; // it is a part, too
  const words = new RegExp(pattern, "gu");
  const pieces = parts.flatMap(
    (part) => data.words && part === end ? [part] : part.match(words) ?? []);
  return pieces.flatMap((piece) => {
    const bytes = toBytes(piece);
    if (ranks.has(bytes)) return [ranks.get(bytes)];
    return data.words ? encodeWord(bytes) : []; // no token: a character that it never saw
  });
}

function unknownIn(text) { // characters that the model never saw; bytes make up all others
  return data.words ? [] : [...new Set(text)].filter((char) => !ranks.has(toBytes(char)));
}

function encodeWord(bytes) { // as in bpe_gpt.py
  const parts = [...bytes];
  while (parts.length > 1) {
    const merged = parts.slice(1).map((part, i) => ranks.get(parts[i] + part) ?? Infinity);
    const best = Math.min(...merged);
    if (best === Infinity) break;
    parts.splice(merged.indexOf(best), 2, data.tokens[best]);
  }
  return parts.map((part) => ranks.get(part));
}

function decode(ids) {
  const bytes = Uint8Array.from(ids.map((id) => data.tokens[id]).join(""), (c) => c.charCodeAt(0));
  return new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
}

// ---- The model ----------------------------------------------------------------------------------
// The forward pass of GPT-2, with the names of char_gpt.py and bpe_gpt.py, for one token at a time.

const parameters = {}; // by PyTorch's names
const n_layer = data.attention?.length ?? 0; // a bigram model has none
const n_head = data.attention?.[0].length;

function readWeights() { // they are 32-bit numbers or, with a scale, 16-bit integers
  for (const [name, base64, scale] of data.weights) {
    const letters = atob(base64);
    const bytes = new Uint8Array(letters.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
    parameters[name] = scale ? new Float32Array(new Int16Array(bytes.buffer)).map((n) => n * scale)
                          : new Float32Array(bytes.buffer);
  }
}

const plus = (x, y) => x.map((number, i) => number + y[i]);
const row = (matrix, i, size) => matrix.subarray(i * size, (i + 1) * size);

function linear(x, weight, bias) { // as nn.Linear: weight is (outputs, inputs)
  const y = new Float32Array(weight.length / x.length);
  for (let i = 0, start = 0; i < y.length; i++, start += x.length) {
    let a = 0, b = 0, c = 0, d = 0, j = 0; // four sums are faster than one
    for (; j + 3 < x.length; j += 4) {
      a += weight[start + j] * x[j];
      b += weight[start + j + 1] * x[j + 1];
      c += weight[start + j + 2] * x[j + 2];
      d += weight[start + j + 3] * x[j + 3];
    }
    for (; j < x.length; j++) a += weight[start + j] * x[j];
    y[i] = a + b + c + d + (bias ? bias[i] : 0);
  }
  return y;
}

function layerNorm(x, weight, bias) {
  const mean = sum(x) / x.length;
  const variance = sum(x.map((number) => (number - mean) ** 2)) / x.length;
  return x.map((number, i) => (number - mean) / Math.sqrt(variance + 1e-5) * weight[i] + bias[i]);
}

const gelu = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));

function logSoftmax(scores) {
  const highest = scores.reduce((a, b) => Math.max(a, b));
  const log = highest + Math.log(sum(scores.map((score) => Math.exp(score - highest))));
  return scores.map((score) => score - log);
}

// past has query, key and value, end to end, of each token so far. Returns what the last one gets,
// and the attention of each head. No mask is needed: later tokens do not exist yet.
function attention(past, isOff) {
  const x = past.at(-1);
  const C = x.length / 3;
  const head_size = C / n_head;
  const y = new Float32Array(C);
  const heads = [];
  for (let head = 0; head < n_head; head++) {
    const start = head * head_size, end = start + head_size;
    const scores = past.map((token) => {
      let product = 0;
      for (let i = start; i < end; i++) product += x[i] * token[C + i];
      return product / Math.sqrt(head_size);
    });
    const weights = logSoftmax(scores).map(Math.exp);
    heads.push({ weights, scores });
    if (isOff(head)) continue; // its part of y remains 0
    past.forEach((token, t) => {
      for (let i = start; i < end; i++) y[i] += weights[t] * token[2 * C + i];
    });
  }
  return [y, heads];
}

function predict(x) { // from the residual stream to the log-probabilities of the next token
  const get = (name) => parameters[`transformer.${name}`];
  const y = layerNorm(x, get("ln_f.weight"), get("ln_f.bias"));
  return logSoftmax(linear(y, parameters["lm_head.weight"] ?? get("wte.weight")));
}

// Reads one more token. A step is what is computed for a token, and later tokens need all earlier
// steps, for their keys and values: the list of steps is the cache.
function forward(id, earlier, off) {
  const step = { id, stream: [], qkv: [], heads: [] };
  if (!n_layer) { // a bigram model is a table
    step.logProbs = logSoftmax(row(parameters["table.weight"], id, data.names.length));
    return step;
  }
  const C = parameters["transformer.ln_f.weight"].length;
  let x = plus(row(parameters["transformer.wte.weight"], id, C),
               row(parameters["transformer.wpe.weight"], earlier.length, C));
  step.stream.push(x);
  for (let layer = 0; layer < n_layer; layer++) {
    const apply = (f, name, x) => f(x, parameters[`transformer.h.${layer}.${name}.weight`],
                                    parameters[`transformer.h.${layer}.${name}.bias`]);
    step.qkv.push(apply(linear, "attn.c_attn", apply(layerNorm, "ln_1", x)));
    const past = [...earlier, step].map((each) => each.qkv[layer]);
    const [y, heads] = attention(past, (head) => off.has(`${layer}.${head}`));
    step.heads.push(heads);
    x = plus(x, apply(linear, "attn.c_proj", y));
    if (!off.has(`${layer}.mlp`)) {
      const wide = apply(linear, "mlp.c_fc", apply(layerNorm, "ln_2", x)).map(gelu);
      x = plus(x, apply(linear, "mlp.c_proj", wide));
    }
    step.stream.push(x);
  }
  step.logProbs = predict(x);
  return step;
}

function readAll(ids, off) {
  const steps = [];
  for (const id of ids) steps.push(forward(id, steps, off));
  return steps;
}

// The same, but what a text shares with the last one at its beginning is not computed again.
const memory = new Map(); // the last steps, for the two choices of what is off that were used last
function read(ids, off) {
  const key = [...off].sort().join();
  const known = memory.get(key) ?? [];
  let same = 0;
  while (same < ids.length && known[same]?.id === ids[same]) same += 1;
  const steps = known.slice(0, same);
  for (const id of ids.slice(same)) steps.push(forward(id, steps, off));
  memory.delete(key);
  memory.set(key, steps); // as the newest
  if (memory.size > 2) memory.delete(memory.keys().next().value);
  return steps;
}

// When the context is full, the model reads from a later token on, with room for half a context.
// Returns where.
function contextStart(length) {
  const half = Math.ceil(data.context_size / 2);
  return half * Math.max(0, Math.ceil((length - data.context_size) / half));
}

// ---- Sampling -----------------------------------------------------------------------------------

function normalize(weights) {
  const total = sum(weights);
  return weights.map((weight) => weight / total);
}

// What choose() in sample.py does: the probabilities of the tokens that are left, descending.
function distribution(scores, { temperature, top_k, top_p, min_p }) {
  if (temperature === 0) return [1]; // all probability is on the likeliest token
  let weights = scores.map((score) => Math.exp((score - scores[0]) / temperature));
  if (top_k > 0) weights = weights.slice(0, top_k);
  const probs = normalize(weights);
  let left = 1; // the likeliest token always stays
  let before = probs[0]; // the sum of the probabilities of all likelier tokens
  while (left < probs.length) {
    if (probs[left] < min_p * probs[0]) break;
    if (top_p < 1 && before >= top_p - 1e-6) break;
    before += probs[left];
    left += 1;
  }
  return normalize(probs.slice(0, left));
}

function ranking({ ranking, logProbs }) { // all tokens, the likeliest first
  if (ranking) return ranking;
  const ids = [...logProbs.keys()].sort((a, b) => logProbs[b] - logProbs[a]);
  return { ids, logProbs: ids.map((id) => logProbs[id]) };
}

function draw(step, settings, seed, n) { // a random token, the nth of a text
  const { ids, logProbs } = ranking(step);
  const probs = distribution(logProbs, settings);
  let rest = random(seed, n);
  let rank = 0;
  while (rank < probs.length - 1 && rest >= probs[rank]) rest -= probs[rank++];
  return ids[rank];
}

// A number from 0 to 1, the same for the same seed and n (the last steps of MurmurHash3).
function random(seed, n) {
  let x = ((seed % 2 ** 32) * 0x9e3779b1 + n * 0x85ebca77) | 0;
  x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
  x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
  return ((x ^ (x >>> 16)) >>> 0) / 2 ** 32;
}

// ---- Looking inside -----------------------------------------------------------------------------

const surprise = (steps, t) => -steps[t - 1].logProbs[steps[t].id] / Math.LN2; // in bits
const total = (steps) => sum(steps.slice(1).map((_, i) => surprise(steps, i + 1)));

// How many more bits per token the text takes without a part, while the others stay on or off.
function worth(part, steps, off) {
  const switched = new Set(off);
  if (!switched.delete(part)) switched.add(part);
  const others = readAll(steps.map((step) => step.id), switched);
  const more = (total(others) - total(steps)) / Math.max(1, steps.length - 1);
  return off.has(part) ? -more : more;
}

// The "logit lens": [token, probability] of the best guess after the embeddings and each layer.
function lens(step) {
  if (step.stream?.length) {
    step.lens ??= step.stream.map(predict).map((logProbs) => {
      const best = logProbs.indexOf(logProbs.reduce((a, b) => Math.max(a, b)));
      return [best, Math.exp(logProbs[best])];
    });
  }
  return step.lens;
}

function settled(guesses) { // from where on the guess is what it will be in the end
  const from = guesses.findLastIndex(([id]) => id !== guesses.at(-1)[0]); // 0: the embeddings
  return from < 0 ? "the embeddings" : `layer ${from}`;
}

// Where the attention of a head goes, as mean shares over the tokens but the first three, for which
// these places are the same. rows has what the head computed for each token, and ids the tokens.
function habit(rows, ids) {
  const shares = { itself: 0, "the token before": 0, "two tokens before": 0, "the first token": 0,
                   "what came next": 0 };
  rows.forEach(({ weights }, t) => {
    if (t < 3) return;
    shares.itself += weights[t];
    shares["the token before"] += weights[t - 1];
    shares["two tokens before"] += weights[t - 2];
    shares["the first token"] += weights[0];
    for (let s = 1; s < t - 2; s++) { // induction (Olsson et al. 2022): s follows an earlier t
      if (ids[s - 1] === ids[t]) shares["what came next"] += weights[s];
    }
  });
  const [place, total] = Object.entries(shares).reduce((a, b) => (b[1] > a[1] ? b : a));
  const share = total / Math.max(1, ids.length - 3);
  return { place, share, label: ids.length < 4 ? "" : share > 0.5 ? place : "mixed" };
}

// ---- Numbers that PyTorch has computed ----------------------------------------------------------
// For a model that is too large for the page, they are all that is shown. For others, they are what
// the functions above have to find, too.

function given() {
  return data.ids.map((id, t) => ({
    id,
    logProbs: { [data.ids[t + 1]]: data.log_probs[t] }, // no more than that of the next token
    rank: data.ranks[t],
    ranking: { ids: data.best[t], logProbs: allScores(data.scores[t]) },
    heads: (data.attention ?? []).map((layer) => layer.map((matrix) => (
      { weights: matrix[t].slice(0, t + 1).map((weight) => weight / 1000) }))),
    lens: data.lens?.probs.map((probs, i) => [data.lens.tokens[i][t], probs[t]]),
  }));
}

// All log-probabilities, in descending order. The data has those of the first ranks, and then of
// ranks 1% apart. Between two of these, they are nearly on a straight line.
function allScores(known) {
  const scores = [known[0]];
  for (let i = 1; i < known.length; i++) {
    const gap = data.score_ranks[i] - data.score_ranks[i - 1];
    for (let n = 1; n <= gap; n++) {
      scores.push(known[i - 1] + (known[i] - known[i - 1]) * (n / gap));
    }
  }
  return scores;
}

function whyNot() { // why this page cannot compute, or "" if it can
  if (!data.weights) return "The model is too large to be in this page, so the text is fixed.";
  try {
    readWeights();
    const steps = read(data.ids, new Set());
    const checked = read(data.check, new Set()); // longer than most texts
    const sameTokens = encode(data.text).join() === data.ids.slice(1).join();
    const wrong = Math.max(...steps.flatMap((step, t) => data.best[t].map(
      (id, i) => Math.abs(step.logProbs[id] - data.scores[t][i]))),
      ...checked.map((step, t) => Math.abs(step.logProbs[0] - data.check_scores[t])));
    if (sameTokens && wrong < (data.rounded ? 0.1 : 0.002)) return "";
  } catch { /* a parameter is missing, or JavaScript does not know this pattern for words */ }
  return "This page cannot run this model, which is not built like GPT-2. So the text is fixed, " +
    "and all numbers are PyTorch's.";
}
