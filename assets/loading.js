// Runs before Gradio's scripts. Gradio 6.31 shows a clock while it loads and forgets to stop it: from then on, for as
// long as the page is open, it asks for sixty frames a second, and each costs a pass of style, layout and painting.
//
// So frames of the loading page end with it: whoever kept this `requestAnimationFrame` gets none any more. What asks
// for it by name, as everything else does, has the browser's own again.

{
  const own = window.requestAnimationFrame;
  let isLoading = true;
  window.requestAnimationFrame = (callback) => (isLoading ? own.call(window, callback) : 0);
  window.endLoading = () => {
    isLoading = false;
    window.requestAnimationFrame = own;
  };
}
