// What scrolls sideways can be reached with the keyboard, also once the equations have their width.
function reachable() {
  for (const box of document.querySelectorAll('div.math, table, .cell_output pre, .highlight pre')) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
}
addEventListener('load', () => {
  const drawn = window.MathJax && MathJax.startup ? MathJax.startup.promise : Promise.resolve();
  drawn.then(reachable);
});
addEventListener('resize', reachable);
// A folded cell is named by the words that it shows.
addEventListener('DOMContentLoaded', () => {
  for (const fold of document.querySelectorAll('summary[aria-label]')) fold.removeAttribute('aria-label');
});
