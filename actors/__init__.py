"""Components and the processes they live in. Imports transport."""
