// What scrolls sideways takes the focus, so that arrow keys scroll it; what fits does not stop Tab.
const follow = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const names = { tabindex: 0, role: "region", "aria-label": target.matches("pre") ? "Code" : "Table" };
    const scrolls = target.scrollWidth > target.clientWidth;
    for (const [name, value] of Object.entries(names)) scrolls ? target.setAttribute(name, value) : target.removeAttribute(name);
  }
});
document.querySelectorAll("article pre, .table-wrapper, .output").forEach((element) => follow.observe(element));

// On a narrow screen, the search that "/" leads to lies in a drawer.
document.addEventListener("keydown", (event) => {
  const narrow = document.querySelector(".nav-overlay-icon").checkVisibility();
  if (event.key === "/" && narrow && !event.target.matches("input, textarea")) document.getElementById("__navigation").checked = true;
}, true);
