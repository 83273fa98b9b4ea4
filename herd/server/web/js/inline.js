// Markdown inside a line: text in, plain objects out. No DOM, time linear in the text, nesting has an end (DEEPEST).
//
// Nodes: {type: "text"|"code"|"math", text}, {type: "break"}, {type: "strong"|"em"|"strike", children},
// {type: "link", href, children}, {type: "image", href, text}.

const DEEPEST = 40;
const LONGEST_ADDRESS = 2000;
const MOST_LABELS = 400;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const ESCAPED = /[!-/:-@[-`{-~]/;
const ADDRESS = /https?:\/\/[^\s<>"'`\u0000-\u001f]{1,2000}/y;
const ENTITY = /&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|([a-z]{2,6}));/y;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "\u00a9", deg: "\u00b0", times: "\u00d7", mdash: "\u2014", ndash: "\u2013", hellip: "\u2026" };

/** The nodes of a text. */
export function parseInline(text) {
  return new Scanner(text).nodes();
}

/** An address that a link may have, or null: only the web and mail, never a script, data or a file. */
export function safeAddress(address) {
  if (/[\u0000-\u0020\\]/.test(address)) return null;
  try {
    const url = new URL(address);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

class Scanner {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.pieces = [];
    this.plain = "";
    this.brackets = [];
    this.never = new Set(); // closing marks that do not come any more
    this.runs = null;
  }

  nodes() {
    const { text } = this;
    while (this.at < text.length) {
      const c = text[this.at];
      const taken =
        c === "\\" ? this.escape()
        : c === "`" ? this.code()
        : c === "$" ? this.dollar()
        : c === "*" || c === "_" || c === "~" ? this.delimiter(c)
        : c === "[" ? this.open(false)
        : c === "!" && text[this.at + 1] === "[" ? this.open(true)
        : c === "]" ? this.close()
        : c === "<" ? this.angle()
        : c === "h" ? this.address()
        : c === "&" ? this.entity()
        : c === "\n" ? this.newline()
        : false;
      if (!taken) {
        this.plain += c;
        this.at += 1;
      }
    }
    this.flush();
    return nested(this.pieces);
  }

  flush() {
    if (this.plain) this.pieces.push({ type: "text", text: this.plain });
    this.plain = "";
  }

  add(piece, length) {
    this.flush();
    this.pieces.push(piece);
    this.at += length;
    return true;
  }

  escape() {
    const next = this.text[this.at + 1];
    if (next === "(" || next === "[") {
      const end = this.find(next === "(" ? "\\)" : "\\]", this.at + 2);
      if (end > 0) return this.add({ type: "math", text: this.text.slice(this.at, end + 2) }, end + 2 - this.at);
    }
    if (next === "\n") return this.add({ type: "break" }, 2);
    if (next === undefined || !ESCAPED.test(next)) return false;
    this.plain += next;
    this.at += 2;
    return true;
  }

  /** The place of `mark` from `from` on, or -1. What is not found once is not looked for again. */
  find(mark, from) {
    if (this.never.has(mark)) return -1;
    const found = this.text.indexOf(mark, from);
    if (found < 0) this.never.add(mark);
    return found;
  }

  code() {
    if (this.runs === null) {
      this.runs = new Map();
      for (const run of this.text.matchAll(/`+/g)) {
        const places = this.runs.get(run[0].length) ?? [];
        places.push(run.index);
        this.runs.set(run[0].length, places);
      }
    }
    let length = 1;
    while (this.text[this.at + length] === "`") length += 1;
    const places = this.runs.get(length) ?? [];
    while (places.length && places[0] <= this.at) places.shift();
    if (!places.length) {
      this.plain += "`".repeat(length);
      this.at += length;
      return true;
    }
    const inside = this.text.slice(this.at + length, places[0]).replaceAll("\n", " ");
    const padded = inside.startsWith(" ") && inside.endsWith(" ") && inside.trim();
    return this.add({ type: "code", text: padded ? inside.slice(1, -1) : inside }, places[0] + length - this.at);
  }

  /** $x$ and $$x$$ stay as they are; "$5 and $6" is money. */
  dollar() {
    const { text, at } = this;
    const mark = text[at + 1] === "$" ? "$$" : "$";
    const from = at + mark.length;
    const end = this.find(mark, from);
    if (end < 0) return false;
    const inside = text.slice(from, end);
    const math = mark === "$$" || !(/^\s|\s$/.test(inside) || /\d/.test(text[end + 1] ?? "") || inside.includes("\n"));
    if (!inside || !math) return false;
    return this.add({ type: "math", text: mark + inside + mark }, end + mark.length - at);
  }

  delimiter(c) {
    const { text, at } = this;
    let count = 1;
    while (text[at + count] === c) count += 1;
    if (c === "~" && count !== 2) return false;
    const before = at === 0 ? " " : text[at - 1];
    const after = text[at + count] ?? " ";
    const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
    const [markBefore, markAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
    const left = !spaceAfter && (!markAfter || spaceBefore || markBefore);
    const right = !spaceBefore && (!markBefore || spaceAfter || markAfter);
    const inWord = c === "_";
    return this.add(
      { delimiter: c, count, opens: left && (!inWord || !right || markBefore), closes: right && (!inWord || !left || markAfter) },
      count,
    );
  }

  open(image) {
    this.flush();
    this.brackets.push({ image, index: this.pieces.length });
    return this.add({ type: "text", text: image ? "![" : "[" }, image ? 2 : 1);
  }

  close() {
    this.flush();
    const opener = this.brackets.pop();
    const target = opener && this.text[this.at + 1] === "(" ? this.target(this.at + 2) : null;
    if (!target || (opener.dead && !opener.image)) return false;
    const inside = nested(this.pieces.splice(opener.index).slice(1));
    const href = safeAddress(target.address);
    if (opener.image) this.pieces.push({ type: "image", href, text: plainText(inside) });
    else if (href === null) this.pieces.push(...inside);
    else this.pieces.push({ type: "link", href, children: inside, depth: 1 + deepest(inside) });
    // a link holds no links; only so many brackets are remembered, the others are text
    if (!opener.image) for (const bracket of this.brackets) bracket.dead = true;
    if (this.brackets.length > MOST_LABELS) this.brackets.splice(0, this.brackets.length - MOST_LABELS);
    this.at = target.end;
    return true;
  }

  /** (address "title") from behind its bracket, or null. */
  target(from) {
    const part = this.text.slice(from, from + LONGEST_ADDRESS);
    const found = /^\s{0,8}(?:<([^<>\n]*)>|([^\s<][^\s]*?)??)(?:\s{1,8}(?:"[^"]*"|'[^']*'))?\s{0,8}\)/.exec(part);
    if (!found) return null;
    let address = found[1] ?? found[2] ?? "";
    let end = found[0].length;
    if (found[2] !== undefined) {
      // parentheses of the address are its own while they come in pairs
      let level = 0;
      const begin = part.indexOf(address);
      for (let i = begin; i < part.length && !/\s/.test(part[i]); i += 1) {
        if (part[i] === "(") level += 1;
        else if (part[i] === ")" && (level -= 1) < 0) {
          if (i > begin + address.length) [address, end] = [part.slice(begin, i), i + 1];
          break;
        }
      }
    }
    return { address, end: from + end };
  }

  angle() {
    const end = this.text.indexOf(">", this.at);
    if (end < 0 || end - this.at > LONGEST_ADDRESS || !/^<(https?:\/\/|mailto:)/.test(this.text.slice(this.at, this.at + 9))) return false;
    const address = this.text.slice(this.at + 1, end);
    const href = safeAddress(address);
    if (href === null) return false;
    return this.add({ type: "link", href, children: [{ type: "text", text: address }] }, end + 1 - this.at);
  }

  address() {
    ADDRESS.lastIndex = this.at;
    const before = this.text[this.at - 1];
    if (before !== undefined && /[\w]/.test(before)) return false;
    if (!this.text.startsWith("http", this.at)) return false;
    const found = ADDRESS.exec(this.text);
    if (!found) return false;
    let address = found[0];
    let open = 0;
    for (const c of address) open += c === "(" ? 1 : c === ")" ? -1 : 0;
    for (let last = address.at(-1); /[.,:;!?*_~)\]]/.test(last ?? ""); last = address.at(-1)) {
      if (last === ")" && open >= 0) break;
      if (last === ")") open += 1;
      address = address.slice(0, -1);
    }
    const href = safeAddress(address);
    if (href === null) return false;
    return this.add({ type: "link", href, children: [{ type: "text", text: address }] }, address.length);
  }

  entity() {
    ENTITY.lastIndex = this.at;
    const found = ENTITY.exec(this.text);
    if (!found) return false;
    const code = found[1] ? Number(found[1]) : found[2] ? Number.parseInt(found[2], 16) : null;
    const character =
      code === null ? ENTITIES[found[3]] : code > 31 && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) ? String.fromCodePoint(code) : "\ufffd";
    if (character === undefined) return false;
    this.plain += character;
    this.at += found[0].length;
    return true;
  }

  newline() {
    this.plain = this.plain.trimEnd();
    return this.add({ type: "break" }, 1);
  }
}

/** Pieces with delimiters as nodes inside each other. */
function nested(pieces) {
  const out = [];
  const openers = []; // of {index in out, piece}
  const bottom = new Map(); // below there is nothing for closers of a kind
  for (const piece of pieces) {
    if (!("delimiter" in piece)) {
      out.push(piece);
      continue;
    }
    let { count } = piece;
    while (piece.closes && count > 0) {
      const kind = `${piece.delimiter}${piece.opens}${piece.count % 3}`;
      let k = openers.length - 1;
      const low = Math.min(bottom.get(kind) ?? 0, openers.length);
      while (k >= low && !meets(openers[k].piece, piece)) k -= 1;
      if (k < low) {
        bottom.set(kind, openers.length);
        break;
      }
      const { index, piece: opener } = openers[k];
      const used = piece.delimiter === "~" || (opener.left >= 2 && count >= 2) ? 2 : 1;
      const children = out.slice(index + 1).map(asText);
      const depth = 1 + deepest(children);
      if (depth > DEEPEST) {
        openers.length = 0; // whatever opened before would hold this, too
        break;
      }
      const type = piece.delimiter === "~" ? "strike" : used === 2 ? "strong" : "em";
      opener.left -= used;
      count -= used;
      openers.length = opener.left > 0 ? k + 1 : k;
      out.length = opener.left > 0 ? index + 1 : index;
      out.push({ type, children, depth });
    }
    if (count === 0) continue;
    const rest = { ...piece, count, left: count };
    if (piece.opens) openers.push({ index: out.length, piece: rest });
    out.push(rest);
  }
  return out.map(asText);
}

function meets(opener, closer) {
  if (opener.delimiter !== closer.delimiter) return false;
  const either = opener.closes || closer.opens;
  return !either || (opener.count + closer.count) % 3 !== 0 || (opener.count % 3 === 0 && closer.count % 3 === 0);
}

const deepest = (nodes) => nodes.reduce((most, node) => Math.max(most, node.depth ?? 0), 0);

function asText(piece) {
  return "delimiter" in piece ? { type: "text", text: piece.delimiter.repeat(piece.left ?? piece.count) } : piece;
}

function plainText(nodes) {
  return nodes.map((node) => node.text ?? (node.children ? plainText(node.children) : " ")).join("");
}
