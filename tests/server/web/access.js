// What a screen reader, a keyboard and weak eyes need, measured on a page as it stands. Returns a list of faults.
() => {
  const faults = [];
  const where = (e) => `${e.tagName.toLowerCase()}${e.id ? `#${e.id}` : ""}${e.className && typeof e.className === "string" ? `.${e.className.split(" ")[0]}` : ""} ${(e.textContent ?? "").trim().slice(0, 30)}`;
  const seen = (e) => e.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && !e.closest("[inert]");
  const all = [...document.querySelectorAll("body *")].filter(seen);

  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  for (const id of new Set(ids)) if (ids.filter((one) => one === id).length > 1) faults.push(`id twice: ${id}`);
  for (const e of document.querySelectorAll("[aria-labelledby], [aria-describedby], [aria-controls]")) {
    for (const name of ["aria-labelledby", "aria-describedby", "aria-controls"]) {
      for (const id of (e.getAttribute(name) ?? "").split(" ").filter(Boolean)) if (!document.getElementById(id)) faults.push(`${name} of nothing: ${id}`);
    }
  }
  if (!document.documentElement.lang) faults.push("no language");
  if (document.querySelectorAll("main").length !== 1) faults.push("not one main");
  if (document.querySelectorAll("h1").length !== 1) faults.push("not one h1");
  if (!document.title) faults.push("no title");

  const named = (e) => {
    const by = (e.getAttribute("aria-labelledby") ?? "").split(" ").map((id) => document.getElementById(id)?.textContent ?? "").join("");
    const labels = [...(e.labels ?? [])].map((label) => label.textContent).join("");
    return (e.getAttribute("aria-label") || by || labels || e.getAttribute("alt") || e.textContent || "").trim();
  };
  for (const e of all) {
    if (e.matches("button, a[href], input:not([type=hidden]), select, textarea, dialog, [role=img], [role=region], [role=group], nav, aside, section") && !named(e)) faults.push(`no name: ${where(e)}`);
    if (e.matches("input, textarea") && !e.getAttribute("aria-label") && !e.labels?.length) faults.push(`only a placeholder: ${where(e)}`);
    if (e.tagName === "IMG" && !e.hasAttribute("alt")) faults.push(`no alt: ${where(e)}`);
    if (e.hasAttribute("tabindex") && e.tabIndex > 0) faults.push(`own tab order: ${where(e)}`);
    if (e.matches("button, a.icon-button, select, input[type=checkbox]")) {
      const box = e.getBoundingClientRect();
      const label = e.closest("label")?.getBoundingClientRect();
      if (Math.min(Math.max(box.width, label?.width ?? 0), Math.max(box.height, label?.height ?? 0)) < 23.5 && !e.disabled) faults.push(`smaller than 24 pixels: ${where(e)}`);
    }
    if (e.closest("[aria-hidden=true]") && e.matches("button, a, input, [tabindex]")) faults.push(`hidden and reachable: ${where(e)}`);
  }

  const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = color;
    pen.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const behind = (e) => {
    const layers = [];
    for (let at = e; at; at = at.parentElement) {
      const color = rgba(getComputedStyle(at).backgroundColor);
      if (color[3] > 0) layers.push(color);
      if (color[3] === 1) break;
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), rgba(getComputedStyle(document.documentElement).backgroundColor).slice(0, 3));
  };
  const light = (color) => {
    const [r, g, b] = color.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [high, low] = [light(a), light(b)].sort((x, y) => y - x);
    return (high + 0.05) / (low + 0.05);
  };
  let least = 21;
  for (const e of all) {
    const own = [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const field = e.matches("input:not([type=checkbox]), textarea, select");
    if ((!own && !field) || e.disabled || e.matches(".unseen, .unseen *, option, optgroup, svg *")) continue;
    const style = getComputedStyle(e);
    const large = Number.parseFloat(style.fontSize) >= 24 || (Number.parseFloat(style.fontSize) >= 18.66 && Number(style.fontWeight) >= 700);
    const below = behind(e);
    const ratio = contrast(over(rgba(style.color), below), below);
    least = Math.min(least, ratio);
    if (ratio < (large ? 3 : 4.5)) faults.push(`contrast ${ratio.toFixed(2)}: ${where(e)}`);
    if (field) {
      const hint = contrast(over(rgba(getComputedStyle(e, "::placeholder").color), below), below);
      if (hint < 4.5) faults.push(`contrast of the placeholder ${hint.toFixed(2)}: ${where(e)}`);
      const frame = e.closest(".field") ?? e;
      const edge = contrast(over(rgba(getComputedStyle(frame).borderTopColor), behind(frame.parentElement)), behind(frame.parentElement));
      if (edge < 3 && !e.closest(".model")) faults.push(`contrast of the border ${edge.toFixed(2)}: ${where(e)}`);
    }
  }
  return { faults, least };
};
