// Markdown as blocks: text in, plain objects out. No DOM. What is not markdown stays text, above all HTML.
//
// Time is linear in the text, and nesting has an end (DEEPEST): replies are written by a model, and may be anything.

const DEEPEST = 12;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\n]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4})(?! )|( {5,})|$)/;
const TASK = /^\[([ xX])\][ \t]+/;
const DELIMITER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const MATH = /^ {0,3}(\$\$|\\\[)/;

/** The blocks of a text. Each has `type` and `source`, the lines that it was made of. */
export function parseBlocks(text) {
  return blocksOf(text.replace(/\r\n?/g, "\n").replaceAll("\0", "\ufffd").split("\n").map(untabbed), 0);
}

function blocksOf(lines, depth) {
  const out = [];
  let at = 0;
  while (at < lines.length) {
    if (blank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, end] =
      fence(lines, at) ??
      math(lines, at) ??
      heading(lines, at) ??
      rule(lines, at) ??
      (depth < DEEPEST ? (quote(lines, at, depth) ?? list(lines, at, depth)) : null) ??
      table(lines, at) ??
      paragraph(lines, at);
    block.source = lines.slice(at, end).join("\n");
    out.push(block);
    at = end;
  }
  return out;
}

const blank = (line) => /^[ \t]*$/.test(line);
const untabbed = (line) => (line.includes("\t") ? line.replace(/^[ \t]+/, (lead) => lead.replaceAll("\t", "    ")) : line);
const indent = (line) => line.length - line.trimStart().length;

function fence(lines, at) {
  const open = FENCE.exec(lines[at]);
  if (!open || (open[1][0] === "`" && open[2].includes("`"))) return null;
  const lead = indent(lines[at]);
  let end = at + 1;
  while (end < lines.length && !closes(lines[end], open[1])) end += 1;
  const text = lines.slice(at + 1, end).map((line) => line.slice(Math.min(lead, indent(line)))).join("\n");
  const closed = end < lines.length;
  return [{ type: "code", language: open[2].trim().split(/\s/)[0].toLowerCase(), text, closed }, closed ? end + 1 : end];
}

function closes(line, mark) {
  const bare = line.trim();
  return indent(line) < 4 && bare.length >= mark.length && bare === mark[0].repeat(bare.length);
}

/** Display math is kept as it is written. */
function math(lines, at) {
  const open = MATH.exec(lines[at]);
  if (!open) return null;
  const close = open[1] === "$$" ? "$$" : "\\]";
  const first = lines[at].trim().slice(2);
  let end = at;
  if (!first.trimEnd().endsWith(close)) {
    do end += 1;
    while (end < lines.length && !blank(lines[end]) && !lines[end].trimEnd().endsWith(close));
    if (end >= lines.length || blank(lines[end])) return null;
  }
  return [{ type: "math", text: lines.slice(at, end + 1).join("\n").trim() }, end + 1];
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  return found ? [{ type: "heading", level: found[1].length, text: found[2] ?? "" }, at + 1] : null;
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? [{ type: "rule" }, at + 1] : null;
}

function quote(lines, at, depth) {
  if (!QUOTE.test(lines[at])) return null;
  let end = at;
  while (end < lines.length && (QUOTE.test(lines[end]) || (!blank(lines[end]) && !interrupts(lines, end)))) end += 1;
  const inside = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [{ type: "quote", blocks: blocksOf(inside, depth + 1) }, end];
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  if (!first || RULE.test(lines[at])) return null;
  const ordered = first[2].length > 1;
  const kind = first[2].at(-1);
  const items = [];
  let loose = false;
  let end = at;
  while (end < lines.length) {
    const found = ITEM.exec(lines[end]);
    if (!found || found[2].at(-1) !== kind || found[2].length > 1 !== ordered || RULE.test(lines[end])) break;
    const width = found[1].length + found[2].length + (found[3]?.length ?? 1);
    const inside = [lines[end].slice(width)];
    end += 1;
    let gap = false;
    while (end < lines.length) {
      const line = lines[end];
      if (blank(line)) {
        gap = true;
      } else if (indent(line) >= Math.min(2, width)) {
        inside.push(...(gap ? [""] : []), line.slice(Math.min(width, indent(line))));
        loose ||= gap && indent(line) < width + 2 && !ITEM.test(line.trimStart());
        gap = false;
      } else if (gap || interrupts(lines, end)) {
        break;
      } else {
        inside.push(line);
      }
      end += 1;
    }
    if (gap && end < lines.length && ITEM.exec(lines[end])?.[2].at(-1) === kind) loose = true;
    const task = TASK.exec(inside[0]);
    if (task) inside[0] = inside[0].slice(task[0].length);
    items.push({ checked: task ? task[1] !== " " : null, blocks: blocksOf(inside, depth + 1) });
  }
  const start = ordered ? Number.parseInt(first[2], 10) : null;
  return [{ type: "list", ordered, start, loose, items }, end];
}

function table(lines, at) {
  if (!startsTable(lines, at)) return null;
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((cell) => {
    const [left, right] = [cell.startsWith(":"), cell.endsWith(":")];
    return left && right ? "center" : right ? "right" : left ? "left" : null;
  });
  const rows = [];
  let end = at + 2;
  while (end < lines.length && !blank(lines[end]) && lines[end].includes("|")) {
    const row = cells(lines[end]).slice(0, head.length);
    rows.push([...row, ...Array(head.length - row.length).fill("")]);
    end += 1;
  }
  return [{ type: "table", align, head, rows }, end];
}

function startsTable(lines, at) {
  const next = lines[at + 1];
  if (next === undefined || !lines[at].includes("|") || !next.includes("-") || !DELIMITER.test(next)) return false;
  const wide = cells(lines[at]).length;
  return wide === cells(next).length && wide <= 64;
}

/** The cells of a row: split at bars that are neither escaped nor in code. */
function cells(line) {
  const out = [];
  let cell = "";
  let code = false;
  for (let i = 0; i < line.length; i += 1) {
    const c = line[i];
    if (c === "\\" && line[i + 1] === "|") {
      cell += "|";
      i += 1;
    } else if (c === "|" && !code) {
      out.push(cell.trim());
      cell = "";
    } else {
      if (c === "`") code = !code && line.indexOf("`", i + 1) > 0;
      cell += c;
    }
  }
  out.push(cell.trim());
  if (out[0] === "") out.shift();
  if (out.length && out.at(-1) === "") out.pop();
  return out;
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !blank(lines[end]) && !interrupts(lines, end)) end += 1;
  return [{ type: "paragraph", text: lines.slice(at, end).map((line) => line.trimStart()).join("\n") }, end];
}

/** Whether this line ends a paragraph before it. */
function interrupts(lines, at) {
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line) || MATH.test(line) || startsTable(lines, at);
}
