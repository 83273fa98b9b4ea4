// Code in colours: one pass of one expression for each language, and every character kept. No DOM: [kind, text] pairs.

const LONGEST = 60_000;

const words = (text) => text.split(" ");
const C_WORDS = words("auto bool break case catch char class const constexpr continue default delete do double else enum extern false final float for fn func go goto if impl import in inline int interface let long loop match mod mut namespace new nil null nullptr operator override package private protected pub public range return self short signed sizeof static struct super switch template this throw trait true try type typedef typename union unsigned use using var virtual void volatile where while defer select chan map string async await move ref dyn unsafe extends implements throws abstract val fun when object data");
const FAMILIES = {
  python: { comment: /#[^\n]*/, string: /(?:[rbfuRBFU]{0,2})(?:"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:\\[\s\S]|[^"\\\n])*"?|'(?:\\[\s\S]|[^'\\\n])*'?)/, words: words("and as assert async await break case class continue def del elif else except False finally for from global if import in is lambda match None nonlocal not or pass raise return self True try while with yield") },
  script: { comment: /\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)/, string: /"(?:\\[\s\S]|[^"\\\n])*"?|'(?:\\[\s\S]|[^'\\\n])*'?|`(?:\\[\s\S]|[^`\\])*`?/, words: words("abstract any as async await boolean break case catch class const continue debugger declare default delete do else enum export extends false finally for from function get if implements import in instanceof interface let new null number of private protected public readonly return set static string super switch this throw true try type typeof undefined unknown var void while with yield") },
  c: { comment: /\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)|#(?:include|define|ifdef|ifndef|endif|pragma|if|else)\b[^\n]*/, string: /"(?:\\[\s\S]|[^"\\\n])*"?|'(?:\\[^\n]|[^'\\\n])'|`[^`]*`?/, words: C_WORDS },
  shell: { comment: /(?<=^|\s)#[^\n]*/, string: /"(?:\\[\s\S]|[^"\\])*"?|'[^']*'?|\$\{[^}\n]*\}|\$\w+/, words: words("case cd do done echo elif else esac exit export fi for function if in local read return set shift source sudo then until while") },
  sql: { comment: /--[^\n]*|\/\*[\s\S]*?(?:\*\/|$)/, string: /'(?:''|[^'])*'?|"[^"\n]*"?/, words: words("add all alter and as asc between by case check column constraint create cross default delete desc distinct drop else end exists false foreign from full group having in index inner insert into is join key left like limit not null offset on or order outer primary references right select set table then true union unique update values view when where with"), anyCase: true },
  markup: { comment: /<!--[\s\S]*?(?:-->|$)/, string: /"[^"\n]*"|'[^'\n]*'/, call: /<\/?[\w:-]+|\/?>/, words: [] },
  css: { comment: /\/\*[\s\S]*?(?:\*\/|$)/, string: /"[^"\n]*"?|'[^'\n]*'?|#[\da-fA-F]{3,8}\b/, call: /[\w-]+(?=\s*:)|@[\w-]+/, words: [] },
  data: { comment: /#[^\n]*/, string: /"(?:\\[\s\S]|[^"\\\n])*"?|'[^'\n]*'?/, call: /^[ \t-]*[\w.-]+(?=\s*[:=])|^\[[^\]\n]*\]/m, words: words("true false null yes no on off") },
  json: { comment: /\/\/[^\n]*/, call: /"(?:\\[\s\S]|[^"\\\n])*"(?=\s*:)/, string: /"(?:\\[\s\S]|[^"\\\n])*"?/, words: words("true false null") },
  diff: { add: /^\+[^\n]*/m, remove: /^-[^\n]*/m, comment: /^@@[^\n]*/m, words: [], only: true },
};
const NAMES = {
  py: "python", python: "python", python3: "python", js: "script", "javascript": "script", jsx: "script", mjs: "script", ts: "script", typescript: "script", tsx: "script",
  c: "c", h: "c", cpp: "c", "c++": "c", cc: "c", cuda: "c", java: "c", kotlin: "c", go: "c", golang: "c", rust: "c", rs: "c", csharp: "c", cs: "c", swift: "c", scala: "c", php: "c", dart: "c",
  sh: "shell", bash: "shell", shell: "shell", zsh: "shell", console: "shell", makefile: "shell", dockerfile: "shell", sql: "sql", html: "markup", xml: "markup", svg: "markup", css: "css", scss: "css",
  yaml: "data", yml: "data", toml: "data", ini: "data", json: "json", jsonc: "json", jsonl: "json", diff: "diff", patch: "diff",
};
const made = new Map();

/** [kind, text] pairs that together are `code`. Kind null is plain; others: comment, string, number, keyword, call, add, remove. */
export function highlight(code, language) {
  const family = FAMILIES[NAMES[language]];
  if (!family || code.length > LONGEST) return [[null, code]];
  if (!made.has(family)) made.set(family, expression(family));
  const out = [];
  let last = 0;
  for (const found of code.matchAll(made.get(family))) {
    const kind = Object.keys(found.groups).find((name) => found.groups[name] !== undefined);
    const known = kind !== "name" ? kind : keyword(family, found[0]) ? "keyword" : null;
    if (known === null || found[0] === "") continue;
    if (found.index > last) out.push([null, code.slice(last, found.index)]);
    out.push([known, found[0]]);
    last = found.index + found[0].length;
  }
  if (last < code.length) out.push([null, code.slice(last)]);
  return out;
}

function expression(family) {
  const own = ["comment", "add", "remove", "call", "string"].filter((kind) => family[kind]).map((kind) => `(?<${kind}>${family[kind].source})`);
  const rest = family.only ? [] : ["(?<number>\\b\\d[\\w.]*)", ...(family.call ? [] : ["(?<call>[A-Za-z_]\\w*(?=\\())"]), "(?<name>[A-Za-z_]\\w*)"];
  return new RegExp([...own, ...rest].join("|"), "gm");
}

function keyword(family, word) {
  return family.words.includes(family.anyCase ? word.toLowerCase() : word);
}
