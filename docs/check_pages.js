// What docs/check_pages.py asks of a page; each function returns its findings as [rule, text].
const checks = {
  // Resolves when nothing more will move: formulas are set, fonts and pictures are there.
  loaded: () => Promise.all([
    window.MathJax?.startup?.promise,
    document.fonts.ready,
    ...[...document.images].map((image) => image.decode().catch(() => null)),
  ]),

  // Wide content is allowed in what scrolls by itself, and beside the window in a drawer that is closed.
  width: (width) => {
    const right = (e) => e.getBoundingClientRect().right;
    const wide = (e) => e.checkVisibility() && e.getBoundingClientRect().width > 1 && right(e) > width + 1;
    const held = (e) => {
      for (let parent = e; parent !== document.body; parent = parent.parentElement) {
        const style = getComputedStyle(parent);
        if (style.position === "fixed" || (parent !== e && /auto|scroll/.test(style.overflowX))) return true;
      }
      return false;
    };
    const found = [...document.querySelectorAll("body *:not(svg *)")].filter((e) => wide(e) && !held(e));
    const name = (e) => [e.tagName.toLowerCase(), ...e.classList].join(".");
    const whole = document.documentElement.scrollWidth;
    return [
      ...(whole > width ? [["width", `the page is ${whole} pixels wide`]] : []),
      ...found.slice(0, 3).map((e) => ["width", `${name(e)} ends at ${Math.round(right(e))}: ${e.textContent.trim().slice(0, 50)}`]),
    ];
  },

  pictures: async (smallest) => {
    const found = [];
    const measure = (svg, name) => {
      const texts = [...svg.querySelectorAll("text")].filter((text) => text.textContent.trim());
      const height = (text) => parseFloat(getComputedStyle(text).fontSize) * Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b);
      const [least] = texts.sort((a, b) => height(a) - height(b));
      if (least && height(least) < smallest) found.push(["text", `${name}: "${least.textContent.trim()}" is ${height(least).toFixed(1)} pixels high`]);
    };
    for (const svg of document.querySelectorAll("svg")) {
      if (svg.checkVisibility() && svg.getBoundingClientRect().width) measure(svg, "a figure");
    }
    for (const image of document.images) {
      const name = image.getAttribute("src").slice(0, 100), width = image.getBoundingClientRect().width;
      if (!image.naturalWidth) found.push(["picture", `${name} did not load`]);
      if (!image.alt.trim()) found.push(["alt", `${name} has no alternative text`]);
      if (!/\.svg$/.test(name) || !width) continue;
      const frame = document.createElement("div");
      frame.style = `position: absolute; visibility: hidden; width: ${width}px`;
      frame.innerHTML = await (await fetch(image.src)).text();
      document.body.append(frame);
      const svg = frame.querySelector("svg");
      svg.style = "width: 100%; height: auto";
      measure(svg, name);
      frame.remove();
    }
    return found;
  },

  // Of the words of code that look alike, the first stands for all: contrast takes most of the time.
  standards: async (tags) => {
    const seen = new Set();
    for (const word of document.querySelectorAll("pre span:not(:has(*)), dt.sig span:not(:has(*))")) {
      const look = `${word.parentElement.className} ${word.className}`;
      if (seen.has(look)) word.style.visibility = "hidden";
      seen.add(look);
    }
    const result = await axe.run(document, {preload: false, resultTypes: ["violations"], runOnly: tags});
    return result.violations.filter((rule) => ["serious", "critical"].includes(rule.impact)).flatMap((rule) =>
      rule.nodes.map((node) => [rule.id, `${node.target.join(" ")}: ${node.failureSummary.split("\n")[1].trim()}`]));
  },
};
