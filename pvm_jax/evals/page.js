// What the scripts of this project's pages share. Everything from the data reaches a page as text nodes (`el`),
// nothing as markup.
const byId = (id) => document.getElementById(id);

/** The text with what has no shape of its own made visible: control characters, halves of surrogate pairs. */
function visible(text) {
  return Array.from(String(text), (c) => {
    const code = c.codePointAt(0);
    if (code < 32 && c !== "\n" && c !== "\t") return String.fromCharCode(0x2400 + code);
    if (code === 127) return "\u2421";
    return (code > 127 && code < 160) || (code >= 0xd800 && code < 0xe000) ? "\ufffd" : c;
  }).join("");
}

function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) node.style.setProperty(key, value);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child instanceof Node ? child : visible(child));
  }
  return node;
}

function fill(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => el("option", { value }, text)));
  select.value = chosen;
}
