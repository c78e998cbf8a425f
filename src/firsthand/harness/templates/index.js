"use strict";
// The index works without this: it is a table. This adds search, filters and sorting, and keeps their state in the address.
(() => {
  const form = document.getElementById("filters");
  const table = document.getElementById("methods");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  const columns = heads.map((head) => head.dataset.sort);
  const start = { q: "", area: "", verdict: "", sort: columns[0], order: "ascending" };
  let state = { ...start };

  const read = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    state = { ...start };
    for (const name of Object.keys(start)) if (given.has(name)) state[name] = given.get(name);
    if (!columns.includes(state.sort)) state.sort = start.sort;
    if (state.order !== "descending") state.order = start.order;
    for (const name of ["q", "area", "verdict"]) form.elements[name].value = state[name];
    for (const name of ["area", "verdict"]) state[name] = form.elements[name].value; // an unknown choice is none
  };

  const write = () => {
    const said = Object.entries(state).filter(([name, value]) => value !== start[name]);
    history.replaceState(null, "", `#${new URLSearchParams(said)}`);
  };

  const show = () => {
    const words = state.q.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      const { words: text, area, verdict } = row.dataset;
      const fits =
        words.every((word) => text.includes(word)) && [area, ""].includes(state.area) && [verdict, ""].includes(state.verdict);
      row.hidden = !fits;
      shown += fits;
    }
    document.getElementById("count").textContent =
      shown === rows.length ? `${shown} methods` : `${shown} of ${rows.length} methods`;
    document.getElementById("nothing").hidden = shown > 0;

    const column = columns.indexOf(state.sort);
    const sign = state.order === "ascending" ? 1 : -1;
    const key = (row) => row.cells[column].dataset.key;
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === ""); // what has no value comes last either way
      const difference = Number(a) - Number(b);
      return sign * (Number.isNaN(difference) ? a.localeCompare(b) : difference);
    };
    body.append(...[...rows].sort((a, b) => compare(key(a), key(b)))); // stable: ties stay in order of title
    heads.forEach((head, i) => (i === column ? head.setAttribute("aria-sort", state.order) : head.removeAttribute("aria-sort")));
  };

  heads.forEach((head) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const again = state.sort === head.dataset.sort && state.order === "ascending";
      Object.assign(state, { sort: head.dataset.sort, order: again ? "descending" : "ascending" });
      write();
      show();
    });
  });
  form.addEventListener("input", () => {
    for (const name of ["q", "area", "verdict"]) state[name] = form.elements[name].value;
    write();
    show();
  });
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    state = { ...start };
    write();
    read();
    show();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", () => {
    read();
    show();
  });
  form.hidden = false;
  read();
  show();
})();
