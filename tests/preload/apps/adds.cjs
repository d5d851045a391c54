// A preload of the user that changes NODE_OPTIONS for the children of its program.
'use strict';
if (process.env.ADDS) process.env.NODE_OPTIONS += process.env.ADDS;
