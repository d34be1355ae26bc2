"use strict";
// Shows chart values at the pointer and selects cells of a head. The page is complete without it.

document.documentElement.classList.add("js");

for (const plot of document.querySelectorAll(".plot")) {
  const data = JSON.parse(document.getElementById(`data-${plot.dataset.chart}`).textContent);
  const svg = plot.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const values = plot.querySelector(".values");
  const width = svg.viewBox.baseVal.width;
  const xs = [...new Set(data.series.flatMap((series) => series.x))].sort((a, b) => a - b);
  let at = null;

  const nearest = (list, x) => {
    let best = 0;
    list.forEach((other, place) => {
      const closer = data.steps ? other <= x : Math.abs(other - x) < Math.abs(list[best] - x);
      if (closer) best = place;
    });
    return data.steps ? Math.min(best, Math.max(0, list.length - 2)) : best;
  };
  const show = (x) => {
    at = x;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
    values.replaceChildren();
    const first = data.series[0];
    const heading = document.createElement("b");
    heading.textContent = first.at[nearest(first.x, x)];
    values.append(heading);
    for (const series of data.series) {
      const line = document.createElement("span");
      const dot = document.createElement("i");
      dot.className = `dot s${series.number}`;
      line.append(dot, `${series.name} ${series.text[nearest(series.x, x)]}`);
      values.append(line);
    }
    values.hidden = false;
    const left = x < width / 2;
    values.style.left = left ? `${(x / width) * 100 + 2}%` : "auto";
    values.style.right = left ? "auto" : `${(1 - x / width) * 100 + 2}%`;
  };
  const hide = () => {
    cursor.style.visibility = "hidden";
    values.hidden = true;
  };
  plot.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    show(data.steps ? Math.max(xs[0], Math.min(x, xs[xs.length - 1])) : xs[nearest(xs, x)]);
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const place = at === null ? xs.length - 1 : nearest(xs, at) + step;
    show(xs[Math.max(0, Math.min(xs.length - 1, place))]);
  });
}

for (const head of document.querySelectorAll(".head")) {
  const links = [...head.querySelectorAll(".grid a")];
  const choose = (link) => {
    const shown = [link.dataset.base, link.dataset.extension, link.hash.slice(1)].filter(Boolean);
    for (const panel of head.querySelectorAll(".panel")) panel.classList.toggle("shown", shown.includes(panel.id));
    for (const other of links) {
      if (shown.includes(other.hash.slice(1))) other.setAttribute("aria-current", "true");
      else other.removeAttribute("aria-current");
    }
  };
  for (const link of links) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      choose(link);
    });
  }
  const asked = links.find((link) => link.hash === location.hash && location.hash);
  choose(asked ?? head.querySelector(".grid a[data-first]"));
}
