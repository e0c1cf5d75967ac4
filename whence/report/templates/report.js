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
  const all = document.getElementById("open"), whole = [...document.querySelectorAll("details.whole")];
  all.addEventListener("click", () => {
    const open = !whole.every((part) => part.open);
    whole.forEach((part) => { part.open = open; });
    all.textContent = open ? "Close all rows" : "Open all rows";
  });
  const find = document.getElementById("find"), rows = [...document.querySelectorAll("li.row")], found = document.getElementById("found");
  find.addEventListener("input", () => {
    const wanted = find.value.trim().toLowerCase();
    let count = 0;
    rows.forEach((row) => { row.hidden = wanted && !row.textContent.toLowerCase().includes(wanted); count += !row.hidden; });
    found.textContent = wanted ? count + " of " + rows.length + " rows" : "";
  });
})();
