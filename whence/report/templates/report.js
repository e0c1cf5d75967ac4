(() => {
  const root = document.documentElement, themes = ["auto", "light", "dark"];
  root.classList.add("js");
  const button = document.getElementById("theme");
  const show = (theme) => {
    if (theme === "auto") root.removeAttribute("data-theme"); else root.dataset.theme = theme;
    button.textContent = "Theme: " + theme;
    try { localStorage.setItem("whence-theme", theme); } catch (error) { /* a file may have no storage */ }
  };
  let theme = "auto";
  try { theme = localStorage.getItem("whence-theme") || "auto"; } catch (error) { /* the same */ }
  show(themes.includes(theme) ? theme : "auto");
  button.addEventListener("click", () => show(themes[(themes.indexOf(root.dataset.theme || "auto") + 1) % 3]));

  // what needs a script: copying a row, and another order of the rows
  const copy = async (button, text) => {
    try { await navigator.clipboard.writeText(text); button.textContent = "copied"; }
    catch (error) { getSelection().selectAllChildren(button.closest("li.row").querySelector(".text, .words")); button.textContent = "selected: press Ctrl-C"; }
    setTimeout(() => { button.textContent = "copy"; }, 2000);
  };
  const order = document.getElementById("order");
  const keys = { effect: (row) => Number(row.dataset.rank), source: (row) => row.dataset.source, tokens: (row) => -Number(row.dataset.tokens), words: (row) => -Number(row.dataset.overlap) };
  const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  const sort = () => {
    const key = keys[order.value];
    for (const list of document.querySelectorAll("#questions ol.rows:not(details.rest ol)")) {
      const more = list.nextElementSibling?.matches("details.rest") ? list.nextElementSibling.querySelector(":scope > ol.rows") : null;
      const rows = [...list.children, ...(more ? more.children : [])].sort((a, b) => compare(key(a), key(b)) || compare(keys.effect(a), keys.effect(b)));
      const first = list.children.length;
      rows.forEach((row, at) => (at < first || !more ? list : more).append(row));
    }
  };
  const dress = () => {
    for (const row of document.querySelectorAll("#questions li.row")) {
      if (row.querySelector("button.copy")) continue;
      const button = document.createElement("button");
      Object.assign(button, { type: "button", className: "copy", textContent: "copy" });
      button.setAttribute("aria-label", "copy the text of row " + row.dataset.rank);
      button.addEventListener("click", () => copy(button, row.querySelector(".text").textContent));
      row.querySelector(".meta").append(button);
    }
    if (order.value !== "effect") sort();
  };
  order.addEventListener("change", sort);

  // questions come in pages: the first as elements, the others compressed until somebody turns to them
  const home = document.getElementById("questions"), size = Number(home.dataset.size), total = document.querySelectorAll("#asked li").length;
  const packed = [null, ...[...document.querySelectorAll("template.packed")].map((part) => part.content.textContent)];
  const first = [...home.childNodes], unpacked = new Map();
  const unpack = async (page) => {
    if (!unpacked.has(page)) {
      const bytes = Uint8Array.from(atob(packed[page]), (letter) => letter.charCodeAt(0));
      unpacked.set(page, await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text());
    }
    return unpacked.get(page);
  };
  const before = document.getElementById("before"), after = document.getElementById("after"), where = document.getElementById("where");
  let shown = 0;
  const turn = async (page) => {
    if (page !== shown && page >= 0 && page < packed.length) {
      if (page === 0) home.replaceChildren(...first); else home.innerHTML = await unpack(page);
      shown = page;
      dress();
      search();
    }
    if (!before) return;
    before.disabled = shown === 0;
    after.disabled = shown === packed.length - 1;
    where.textContent = "Questions " + (shown * size + 1) + " to " + Math.min(total, (shown + 1) * size) + " of " + total;
  };
  const follow = async () => {
    const asked = /^#[qt](\d+)/.exec(location.hash);
    if (!asked) return;
    await turn(Math.floor(asked[1] / size));
    document.querySelector("#q" + asked[1] + " details.rows-of")?.setAttribute("open", "");
    document.getElementById(location.hash.slice(1))?.scrollIntoView({ behavior: "instant" });
  };

  const all = document.getElementById("open");
  all.addEventListener("click", () => {
    const whole = [...document.querySelectorAll("details.whole, details.rows-of")], open = !whole.every((part) => part.open);
    whole.forEach((part) => { part.open = open; });
    all.textContent = open ? "Close all rows" : "Open all rows";
  });
  const find = document.getElementById("find"), found = document.getElementById("found"), texts = [];
  const lower = (part) => part.textContent.toLowerCase(), rowsOf = (part) => [...part.querySelectorAll("li.row")];
  const read = async () => {
    for (const page of packed.keys()) {
      const parts = page ? new DOMParser().parseFromString(await unpack(page), "text/html").querySelectorAll("section.query") : first;
      for (const part of parts) if (part.nodeType === 1) texts.push(rowsOf(part).map(lower));
    }
  };
  let reading;
  const search = async () => {
    const wanted = find.value.trim().toLowerCase();
    rowsOf(home).forEach((row) => {
      row.hidden = !lower(row).includes(wanted);
      if (wanted && !row.hidden) for (let part = row.parentElement; part !== home; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
    });
    if (wanted) await (reading ??= read());
    if (wanted !== find.value.trim().toLowerCase()) return;
    const counts = texts.map((rows) => rows.filter((text) => text.includes(wanted)).length), sum = (list) => list.reduce((a, b) => a + b, 0);
    document.querySelectorAll("#asked li").forEach((item, number) => { item.hidden = wanted && !counts[number]; });
    found.textContent = wanted ? sum(counts) + " of " + sum(texts.map((rows) => rows.length)) + " rows, in " + counts.filter(Boolean).length + " of " + total + " questions" : "";
  };
  find.addEventListener("input", search);
  if (before) {
    const go = async (page) => { await turn(page); home.querySelector("section")?.scrollIntoView({ behavior: "instant" }); };
    before.addEventListener("click", () => go(shown - 1));
    after.addEventListener("click", () => go(shown + 1));
  }
  addEventListener("hashchange", follow);
  dress();
  turn(0);
  follow();
})();
