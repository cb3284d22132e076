// Runs before Gradio's scripts. Gradio 6.31 shows a clock while it loads and forgets to stop it: from then on, for as
// long as the page is open, it asks for sixty frames a second, and each costs a pass of style, layout and painting.
//
// The clock keeps the `requestAnimationFrame` that it found when it was loaded: this one, which after loading gives it no
// frame any more. Whoever asks for the function by name has the browser's own by then.

{
  const CLOCK = /performance\.now\(\)\s*-[^;]{1,40}\/\s*1e3/; // seconds since it began
  const own = window.requestAnimationFrame;
  let isLoading = true;
  window.requestAnimationFrame = (callback) => (!isLoading && CLOCK.test(callback) ? 0 : own.call(window, callback));
  window.endLoading = () => {
    isLoading = false;
    window.requestAnimationFrame = own;
  };
}
